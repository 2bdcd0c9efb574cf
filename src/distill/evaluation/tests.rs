//! Constants: scikit-learn 1.9.1 (`accuracy_score`, `f1_score`, `matthews_corrcoef`,
//! `precision_recall_fscore_support`, `confusion_matrix`, `mean_absolute_error`) and SciPy 1.17.1
//! (`pearsonr`, `spearmanr`, `entropy`, `minimize_scalar`) on the same 60 rows.

use super::*;

const ROWS: usize = 60;

/// Quarters, so that no rounding makes or breaks a tie.
fn student() -> Vec<Vec<f32>> {
    table(|i, j| ((i * 7 + j * 11 + (i * i * j) % 13) % 17) as f32 / 4.0 - 2.0)
}

fn teacher() -> Vec<Vec<f32>> {
    table(|i, j| ((i * 3 + j * 5 + (i * j * j) % 11) % 19) as f32 / 4.0 - 1.75)
}

fn table(cell: impl Fn(usize, usize) -> f32) -> Vec<Vec<f32>> {
    (0..ROWS)
        .map(|i| (0..3).map(|j| cell(i, j)).collect())
        .collect()
}

/// The student is right in two rows of three, and by chance in the others.
fn classes() -> Vec<Label> {
    let class = |(i, logits): (usize, &Vec<f32>)| match i % 3 {
        0 => Label::Class((i * 5 + i / 7) % 3),
        _ => Label::Class(greatest(logits)),
    };
    student().iter().enumerate().map(class).collect()
}

fn sets() -> Vec<Label> {
    let set = |(i, logits): (usize, &Vec<f32>)| match i % 2 {
        0 => {
            let has = |&j: &usize| (i * 3 + j * 5 + (i * j) % 7) % 4 == 0;
            Label::Labels((0..3).filter(has).collect())
        }
        _ => Label::Labels(given(logits)),
    };
    student().iter().enumerate().map(set).collect()
}

fn names() -> Vec<String> {
    ["a", "b", "c"].map(String::from).to_vec()
}

fn all(labels: &[Label]) -> Vec<Option<&Label>> {
    labels.iter().map(Some).collect()
}

#[track_caller]
fn close(found: impl Into<Option<f64>>, expected: f64) {
    let found = found.into().expect("the figure should be there");
    assert!(
        (found - expected).abs() < 1e-6,
        "found {found}, expected {expected}"
    );
}

fn single(logits: &[Vec<f32>], labels: &[Option<&Label>]) -> Result<Evaluation, EvaluationError> {
    evaluate(
        Scoring::of(ProblemType::SingleLabelClassification),
        &names(),
        logits,
        labels,
        1,
    )
}

#[test]
fn single_label_figures_are_those_of_scikit_learn() {
    let labels = classes();
    let evaluation = single(&student(), &all(&labels)).unwrap();
    assert_eq!(evaluation.rows, 60);
    assert_eq!(evaluation.score.metric, Metric::Accuracy);
    close(evaluation.score.value, 0.766_666_666_666_666_7);
    close(evaluation.accuracy, 0.766_666_666_666_666_7);
    close(evaluation.macro_f1, 0.762_805_662_805_662_9);
    close(evaluation.mcc, 0.638_140_747_176_368_4);
    close(evaluation.ece, 0.153_337_269_777_012_87);
    assert_eq!(
        evaluation.confusion.as_deref(),
        Some(&[vec![22, 4, 2], vec![4, 13, 0], vec![1, 3, 11]][..])
    );
    let b = &evaluation.classes[1];
    assert_eq!((b.label.as_str(), b.support, b.predicted), ("b", 17, 20));
    close(b.precision, 0.65);
    close(b.recall, 0.764_705_88);
    close(b.f1, 0.702_702_7);
    assert!(evaluation.score.low < 0.72 && evaluation.score.high > 0.82);
}

#[test]
fn a_temperature_is_fitted_by_maximum_likelihood() {
    let (logits, labels) = (student(), classes());
    let labels = all(&labels);
    let kind = ProblemType::SingleLabelClassification;
    let calibration = calibrate(kind, (&logits, &labels), (&logits, &labels))
        .unwrap()
        .unwrap();
    assert!((calibration.temperature - 1.014_591_9).abs() < 1e-5);
    assert!((calibration.ece - 0.152_874_78).abs() < 1e-5);

    // A model that is ten times too sure needs ten times the temperature.
    let sure: Vec<Vec<f32>> = logits
        .iter()
        .map(|row| row.iter().map(|x| x * 10.0).collect())
        .collect();
    let calibration = calibrate(kind, (&sure, &labels), (&sure, &labels))
        .unwrap()
        .unwrap();
    assert!((calibration.temperature - 10.145_919).abs() < 1e-4);

    let unlabelled = vec![None; ROWS];
    assert_eq!(
        calibrate(kind, (&logits, &unlabelled), (&logits, &labels)),
        Ok(None)
    );
}

#[test]
fn multi_label_figures_are_those_of_scikit_learn() {
    let labels = sets();
    let kind = ProblemType::MultiLabelClassification;
    let evaluation = evaluate(Scoring::of(kind), &names(), &student(), &all(&labels), 1).unwrap();
    assert_eq!(evaluation.score.metric, Metric::MacroF1);
    close(evaluation.accuracy, 0.566_666_666_666_666_7);
    close(evaluation.macro_f1, 0.736_892_327_530_625_5);
    close(evaluation.score.value, 0.736_892_327_530_625_5);
    close(evaluation.micro_f1, 0.736_842_105_263_157_9);
    close(evaluation.ece, 0.121_824_387_295_678_09);
    assert!(evaluation.confusion.is_none() && evaluation.mcc.is_none());
}

#[test]
fn regression_figures_are_those_of_scipy() {
    let targets: Vec<f32> = teacher().iter().map(|row| row[0]).collect();
    let labels: Vec<Label> = targets.iter().map(|&t| Label::Value(t)).collect();
    let logits: Vec<Vec<f32>> = student()
        .iter()
        .zip(&targets)
        .map(|(row, target)| vec![row[0] + target])
        .collect();
    let names = ["value".to_owned()];
    let evaluation = evaluate(
        Scoring::of(ProblemType::Regression),
        &names,
        &logits,
        &all(&labels),
        1,
    )
    .unwrap();
    assert_eq!(evaluation.score.metric, Metric::PearsonSpearman);
    close(evaluation.pearson, 0.743_745_339_316_970_7);
    close(evaluation.spearman, 0.725_807_426_793_649_6);
    close(evaluation.score.value, 0.734_776_383_055_310_2);
    close(evaluation.mean_absolute_error, 1.0625);
    assert!(evaluation.score.low < evaluation.score.value);
    assert!(evaluation.score.high > evaluation.score.value);
    assert!(evaluation.accuracy.is_none() && evaluation.ece.is_none());
}

#[test]
fn likeness_to_the_teacher_is_that_of_scipy() {
    let (student, teacher) = (student(), teacher());
    let found = likeness(ProblemType::SingleLabelClassification, &student, &teacher).unwrap();
    close(found.agreement, 0.416_666_666_666_666_7);
    close(found.mean_kl, 0.903_590_004_607_249_6);
    let found = likeness(ProblemType::MultiLabelClassification, &student, &teacher).unwrap();
    close(found.agreement, 0.116_666_666_666_666_67);
    close(found.mean_kl, 1.083_746_653_332_145_1);
    let itself = likeness(ProblemType::SingleLabelClassification, &teacher, &teacher).unwrap();
    assert_eq!((itself.agreement, itself.mean_kl), (1.0, Some(0.0)));
}

#[test]
fn a_model_held_against_its_own_answers_is_always_right() {
    let logits = teacher();
    let labels = teacher_answers(ProblemType::SingleLabelClassification, &logits);
    assert_eq!(single(&logits, &all(&labels)).unwrap().score.value, 1.0);
    let labels = teacher_answers(ProblemType::MultiLabelClassification, &logits);
    let kind = ProblemType::MultiLabelClassification;
    let evaluation = evaluate(Scoring::of(kind), &names(), &logits, &all(&labels), 1).unwrap();
    assert_eq!(evaluation.score.value, 1.0);
}

#[test]
fn rows_without_a_label_are_passed_over() {
    let labels = classes();
    let mut some = all(&labels);
    some[30..].fill(None);
    let evaluation = single(&student(), &some).unwrap();
    let first = single(&student()[..30], &all(&labels[..30])).unwrap();
    assert_eq!(evaluation, first);
    assert_eq!(
        single(&student(), &vec![None; ROWS]),
        Err(EvaluationError::NoLabels)
    );
}

#[test]
fn the_majority_answer_is_that_of_the_training_rows() {
    let train = [Label::Class(2), Label::Class(2), Label::Class(0)];
    let test = [
        Label::Class(2),
        Label::Class(0),
        Label::Class(1),
        Label::Class(2),
    ];
    let kind = ProblemType::SingleLabelClassification;
    let evaluation = majority(Scoring::of(kind), &names(), &all(&train), &all(&test), 1).unwrap();
    assert_eq!(evaluation.accuracy, Some(0.5));
    assert_eq!(evaluation.classes[2].predicted, 4);
    assert_eq!(evaluation.mcc, Some(0.0));
    assert!(evaluation.ece.is_none());

    let train = [
        Label::Labels(vec![0, 1]),
        Label::Labels(vec![0]),
        Label::Labels(vec![]),
    ];
    let test = [Label::Labels(vec![0]), Label::Labels(vec![1])];
    let kind = ProblemType::MultiLabelClassification;
    let evaluation = majority(Scoring::of(kind), &names(), &all(&train), &all(&test), 1).unwrap();
    assert_eq!(evaluation.accuracy, Some(0.5));

    let train = [Label::Value(1.0), Label::Value(3.0)];
    let test = [Label::Value(1.0), Label::Value(2.0)];
    let names = ["value".to_owned()];
    let evaluation = majority(
        Scoring::of(ProblemType::Regression),
        &names,
        &all(&train),
        &all(&test),
        1,
    )
    .unwrap();
    assert_eq!(evaluation.mean_absolute_error, Some(0.5));
    assert_eq!(evaluation.score.value, 0.0);
}

#[test]
fn logits_that_do_not_fit_are_named() {
    let labels = classes();
    assert_eq!(
        single(&student()[1..], &all(&labels)),
        Err(EvaluationError::Rows {
            logits: 59,
            labels: 60
        })
    );
    let mut logits = student();
    logits[4].pop();
    assert_eq!(
        single(&logits, &all(&labels)),
        Err(EvaluationError::Width {
            row: 4,
            found: 2,
            expected: 3
        })
    );
    let mut logits = student();
    logits[5][1] = f32::NAN;
    assert_eq!(
        single(&logits, &all(&labels)),
        Err(EvaluationError::NotFinite { row: 5 })
    );
    let wrong = vec![Label::Class(3); ROWS];
    assert!(matches!(
        single(&student(), &all(&wrong)),
        Err(EvaluationError::Label { row: 0, .. })
    ));
}

#[test]
fn greatest_logits_that_are_equal_give_the_first_class() {
    assert_eq!(greatest(&[1.0, 2.0, 2.0]), 1);
}
