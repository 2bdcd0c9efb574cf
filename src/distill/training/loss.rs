//! The loss of KD-LoRA: α·T²·KL(teacher ‖ student at T) + (1 − α)·task loss (Hinton et al.,
//! arXiv 1503.02531; Azimi et al., arXiv 2410.20777).

use candle_core::{D, Result, Tensor};

use crate::adapter::ProblemType;
use crate::distill::dataset::Label;

/// How teacher and labels share the loss.
#[derive(Clone, Copy, Debug)]
pub struct LossWeights<'a> {
    pub temperature: f64,
    /// Share of the teacher where a row has both a label and teacher's logits. A row with only
    /// one of them learns from that one alone, with full weight.
    pub alpha: f64,
    /// How much each label counts in the task loss, `[labels]`; `None` if all count alike.
    pub labels: Option<&'a [f32]>,
}

/// The loss summed over rows, a scalar, for `logits` of `[rows, labels]`.
///
/// The task loss is cross entropy for classes, the mean over labels of binary cross entropy for
/// several labels, and the squared error for a regression. The weight of a label multiplies the
/// cross entropy of the rows of a class, or that of the presence of one of several labels. The
/// teacher's part is the divergence in the
/// same form, for a regression the squared distance to the teacher's value.
pub fn distillation_loss(
    problem_type: ProblemType,
    logits: &Tensor,
    labels: &[Option<&Label>],
    teacher: &[Option<&[f32]>],
    weights: LossWeights<'_>,
) -> Result<Tensor> {
    let targets = Targets::new(logits, labels, teacher, weights.alpha)?;
    let label_weights = match weights.labels {
        Some(labels) => Some(Tensor::from_slice(labels, labels.len(), logits.device())?),
        None => None,
    };
    let temperature = match problem_type {
        ProblemType::Regression => 1.0,
        _ => weights.temperature,
    };
    let (task, soft) = match problem_type {
        ProblemType::SingleLabelClassification => (
            cross_entropy(logits, &weighted(&targets.hard, label_weights.as_ref())?)?,
            kl_of_softmax(logits, &targets.soft, temperature)?,
        ),
        ProblemType::MultiLabelClassification => (
            match &label_weights {
                None => binary_cross_entropy(logits, &targets.hard)?,
                Some(weights) => weighted_binary_cross_entropy(logits, &targets.hard, weights)?,
            },
            kl_of_sigmoids(logits, &targets.soft, temperature)?,
        ),
        ProblemType::Regression => (
            (logits - &targets.hard)?.sqr()?.sum(D::Minus1)?,
            (logits - &targets.soft)?.sqr()?.sum(D::Minus1)?,
        ),
    };
    let task = (task * &targets.task_weight)?;
    let soft = ((soft * &targets.soft_weight)? * temperature.powi(2))?;
    (task + soft)?.sum_all()
}

/// Dense targets; rows without a label or without a teacher weigh nothing in that part.
struct Targets {
    /// One-hot classes, several-hot labels, or values: `[rows, labels]`.
    hard: Tensor,
    /// The teacher's logits, `[rows, labels]`.
    soft: Tensor,
    /// `[rows]`
    task_weight: Tensor,
    /// `[rows]`
    soft_weight: Tensor,
}

impl Targets {
    fn new(
        logits: &Tensor,
        labels: &[Option<&Label>],
        teacher: &[Option<&[f32]>],
        alpha: f64,
    ) -> Result<Self> {
        let (rows, width) = logits.dims2()?;
        if labels.len() != rows || teacher.len() != rows {
            candle_core::bail!("{rows} rows of logits, {} labels", labels.len());
        }
        let mut hard = vec![0f32; rows * width];
        let mut soft = vec![0f32; rows * width];
        let mut task_weight = vec![0f32; rows];
        let mut soft_weight = vec![0f32; rows];
        for i in 0..rows {
            let row = i * width..(i + 1) * width;
            let alpha = match (labels[i], teacher[i]) {
                (Some(_), Some(_)) => alpha,
                (None, Some(_)) => 1.0,
                (_, None) => 0.0,
            };
            if let Some(label) = labels[i] {
                mark(label, &mut hard[row.clone()]);
                task_weight[i] = (1.0 - alpha) as f32;
            }
            if let Some(teacher) = teacher[i] {
                if teacher.len() != width {
                    candle_core::bail!("{} logits of the teacher, {width} labels", teacher.len());
                }
                soft[row].copy_from_slice(teacher);
                soft_weight[i] = alpha as f32;
            }
        }
        let device = logits.device();
        Ok(Self {
            hard: Tensor::from_vec(hard, (rows, width), device)?,
            soft: Tensor::from_vec(soft, (rows, width), device)?,
            task_weight: Tensor::from_vec(task_weight, rows, device)?,
            soft_weight: Tensor::from_vec(soft_weight, rows, device)?,
        })
    }
}

fn mark(label: &Label, row: &mut [f32]) {
    match label {
        Label::Class(class) => row[*class] = 1.0,
        Label::Labels(labels) => labels.iter().for_each(|label| row[*label] = 1.0),
        Label::Value(value) => row[0] = *value,
    }
}

/// log softmax over the last dimension.
fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    shifted.broadcast_sub(&log_sum)
}

/// ln(1 + eˣ), without overflow.
fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

fn cross_entropy(logits: &Tensor, one_hot: &Tensor) -> Result<Tensor> {
    (log_softmax(logits)? * one_hot)?.sum(D::Minus1)?.neg()
}

/// Mean over labels; `targets` are probabilities.
fn binary_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    (softplus(logits)? - (logits * targets)?)?.mean(D::Minus1)
}

/// Targets times the weights of their labels.
fn weighted(targets: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
    match weights {
        Some(weights) => targets.broadcast_mul(weights),
        None => Ok(targets.clone()),
    }
}

/// The same with the loss of a label that is present (target 1) times its weight.
fn weighted_binary_cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
) -> Result<Tensor> {
    let present = (softplus(&logits.neg()?)? * targets)?.broadcast_mul(weights)?;
    let absent = (softplus(logits)? * (1.0 - targets)?)?;
    (present + absent)?.mean(D::Minus1)
}

fn kl_of_softmax(student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    let teacher = log_softmax(&(teacher / temperature)?)?;
    let student = log_softmax(&(student / temperature)?)?;
    (teacher.exp()? * (teacher - student)?)?.sum(D::Minus1)
}

fn kl_of_sigmoids(student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    let teacher = (teacher / temperature)?;
    let probabilities = ((teacher.neg()?.exp()? + 1.0)?).recip()?;
    let entropy = binary_cross_entropy(&teacher, &probabilities)?;
    binary_cross_entropy(&(student / temperature)?, &probabilities)? - entropy
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    const WEIGHTS: LossWeights<'static> = LossWeights {
        temperature: 2.0,
        alpha: 0.5,
        labels: None,
    };

    fn tensor(rows: &[&[f32]]) -> Tensor {
        let values: Vec<f32> = rows.concat();
        Tensor::from_vec(values, (rows.len(), rows[0].len()), &Device::Cpu).unwrap()
    }

    fn value(
        problem: ProblemType,
        logits: &[&[f32]],
        labels: &[Option<&Label>],
        teacher: &[Option<&[f32]>],
    ) -> f32 {
        let loss = distillation_loss(problem, &tensor(logits), labels, teacher, WEIGHTS);
        loss.unwrap().to_scalar::<f32>().unwrap()
    }

    #[test]
    fn classes_agree_with_the_formula() {
        // By hand: softmax([2, 0]) = (0.880797, 0.119203), cross entropy of class 1 = 2.126928;
        // at T = 2: student (0.731059, 0.268941), teacher of [0, 2] the reverse, KL = 0.462117.
        let loss = value(
            ProblemType::SingleLabelClassification,
            &[&[2.0, 0.0]],
            &[Some(&Label::Class(1))],
            &[Some(&[0.0, 2.0])],
        );
        assert!(
            (loss - (0.5 * 2.126_928 + 0.5 * 4.0 * 0.462_117)).abs() < 1e-5,
            "{loss}"
        );
    }

    #[test]
    fn several_labels_agree_with_the_formula() {
        // Binary cross entropies of [1, -1] against (1, 1): 0.313262 and 1.313262.
        let loss = value(
            ProblemType::MultiLabelClassification,
            &[&[1.0, -1.0]],
            &[Some(&Label::Labels(vec![0, 1]))],
            &[None],
        );
        assert!((loss - 0.813_262).abs() < 1e-5, "{loss}");
    }

    #[test]
    fn a_regression_is_pulled_to_label_and_teacher() {
        let loss = value(
            ProblemType::Regression,
            &[&[1.0]],
            &[Some(&Label::Value(3.0))],
            &[Some(&[2.0])],
        );
        assert!((loss - (0.5 * 4.0 + 0.5 * 1.0)).abs() < 1e-6, "{loss}");
    }

    #[test]
    fn a_weight_multiplies_the_loss_of_its_label_and_leaves_the_teacher_alone() {
        let weighted = |problem, label: &Label, teacher: Option<&[f32]>, weights: &[f32]| {
            let weights = LossWeights {
                labels: Some(weights),
                ..WEIGHTS
            };
            let logits = tensor(&[&[2.0, 0.0]]);
            let loss = distillation_loss(problem, &logits, &[Some(label)], &[teacher], weights);
            loss.unwrap().to_scalar::<f32>().unwrap()
        };
        let classes = ProblemType::SingleLabelClassification;
        let label = Label::Class(1);
        // Cross entropy of class 1: 2.126928.
        let loss = weighted(classes, &label, None, &[9.0, 3.0]);
        assert!((loss - 3.0 * 2.126_928).abs() < 1e-5, "{loss}");
        let teacher: &[f32] = &[2.0, 0.0];
        let loss = weighted(classes, &label, Some(teacher), &[9.0, 3.0]);
        assert!((loss - 0.5 * 3.0 * 2.126_928).abs() < 1e-5, "{loss}");
        // softplus(-2) = 0.126928 times 5 for the label that is there, ln 2 for the other.
        let several = ProblemType::MultiLabelClassification;
        let loss = weighted(several, &Label::Labels(vec![0]), None, &[5.0, 7.0]);
        let expected = (5.0 * 0.126_928 + std::f32::consts::LN_2) / 2.0;
        assert!((loss - expected).abs() < 1e-5, "{loss}");
    }

    #[test]
    fn a_student_that_equals_its_teacher_has_no_soft_loss() {
        for problem in [
            ProblemType::SingleLabelClassification,
            ProblemType::MultiLabelClassification,
        ] {
            let logits: &[f32] = &[1.5, -0.5, 30.0];
            let loss = value(problem, &[logits], &[None], &[Some(logits)]);
            assert!(loss.abs() < 1e-5, "{problem:?}: {loss}");
        }
    }

    #[test]
    fn a_row_with_one_source_learns_from_it_with_full_weight() {
        let problem = ProblemType::SingleLabelClassification;
        let label = Label::Class(0);
        let only_label = value(problem, &[&[0.0, 0.0]], &[Some(&label)], &[None]);
        assert!((only_label - 2f32.ln()).abs() < 1e-6);
        let only_teacher = value(problem, &[&[2.0, 0.0]], &[None], &[Some(&[0.0, 2.0])]);
        assert!((only_teacher - 4.0 * 0.462_117).abs() < 1e-5);
    }

    #[test]
    fn gradients_point_to_the_target() {
        for problem in [
            ProblemType::SingleLabelClassification,
            ProblemType::MultiLabelClassification,
        ] {
            let logits = Var::from_tensor(&tensor(&[&[0.3, -0.2, 0.1]])).unwrap();
            let label = match problem {
                ProblemType::SingleLabelClassification => Label::Class(2),
                _ => Label::Labels(vec![2]),
            };
            let teacher: &[f32] = &[-1.0, -1.0, 2.0];
            let loss = distillation_loss(
                problem,
                logits.as_tensor(),
                &[Some(&label)],
                &[Some(teacher)],
                WEIGHTS,
            );
            let gradients = loss.unwrap().backward().unwrap();
            let g = gradients
                .get(logits.as_tensor())
                .unwrap()
                .to_vec2::<f32>()
                .unwrap();
            assert!(g[0][2] < 0.0 && g[0][0] > 0.0, "{problem:?}: {g:?}");
        }
    }
}
