//! Whether a version is good enough to go live.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::evaluation::Evaluation;
use super::spec::GateSpec;

/// A class with fewer test rows than this may go unpredicted: so few rows prove nothing.
pub const MIN_SUPPORT: usize = 5;

/// The verdict on one version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Gate {
    pub passed: bool,
    pub conditions: Vec<Condition>,
    /// A sentence for each condition that failed.
    pub reasons: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Condition {
    pub name: ConditionName,
    pub value: f64,
    /// What `value` is held against.
    pub bound: f64,
    pub passed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConditionName {
    /// The student's score is at least `keep` times the teacher's.
    KeepsTeacherScore,
    /// The student's score is above that of the majority class.
    BeatsMajority,
    /// No class with at least [`MIN_SUPPORT`] test rows is never predicted; `value` counts those
    /// that are.
    NoClassCollapses,
    /// The student's score is at least `min_score`.
    ReachesScore,
    /// The calibration error as served is at most `max_calibration_error`.
    IsCalibrated,
}

impl fmt::Display for ConditionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeepsTeacherScore => "keeps enough of the teacher's score",
            Self::BeatsMajority => "beats the most common answer",
            Self::NoClassCollapses => "classes that are never predicted",
            Self::ReachesScore => "reaches the least score",
            Self::IsCalibrated => "calibration error as served",
        })
    }
}

impl Gate {
    /// Judges the student. A pass without a teacher has no teacher's score to keep; one without
    /// labels has no majority class to beat.
    pub fn judge(
        spec: &GateSpec,
        student: &Evaluation,
        teacher: Option<&Evaluation>,
        majority: Option<&Evaluation>,
    ) -> Self {
        let mut gate = Self {
            passed: true,
            conditions: Vec::new(),
            reasons: Vec::new(),
        };
        if let Some(teacher) = teacher {
            gate.keeps_teacher_score(spec.keep, student.score.value, teacher.score.value);
        }
        if let Some(majority) = majority {
            gate.beats_majority(student.score.value, majority.score.value);
        }
        gate.no_class_collapses(student);
        if let Some(least) = spec.min_score {
            let value = student.score.value;
            gate.add(
                ConditionName::ReachesScore,
                value,
                least,
                value >= least,
                || format!("the student scores {value:.4}; at least {least:.4} is asked"),
            );
        }
        if let (Some(most), Some(calibration)) = (spec.max_calibration_error, student.calibration) {
            let value = calibration.ece;
            gate.add(
                ConditionName::IsCalibrated,
                value,
                most,
                value <= most,
                || format!("the calibration error is {value:.4}; at most {most:.4} is asked"),
            );
        }
        gate
    }

    fn keeps_teacher_score(&mut self, keep: f64, student: f64, teacher: f64) {
        // The margin lets a student pass that is exactly at the bound but for rounding.
        let bound = keep * teacher;
        self.add(
            ConditionName::KeepsTeacherScore,
            student,
            bound,
            student >= bound - 1e-12,
            || {
                let share = if teacher > 0.0 {
                    format!(", {:.1} % of it", 100.0 * student / teacher)
                } else {
                    String::new()
                };
                format!(
                    "the student scores {student:.4} where the teacher scores {teacher:.4}{share}; \
                     at least {:.1} % is asked",
                    100.0 * keep
                )
            },
        );
    }

    fn beats_majority(&mut self, student: f64, majority: f64) {
        self.add(
            ConditionName::BeatsMajority,
            student,
            majority,
            student > majority,
            || {
                format!(
                    "the student scores {student:.4}, no better than the {majority:.4} of always \
                     giving the most common answer"
                )
            },
        );
    }

    fn no_class_collapses(&mut self, student: &Evaluation) {
        if student.classes.is_empty() {
            return;
        }
        let collapsed: Vec<String> = student
            .classes
            .iter()
            .filter(|class| class.support >= MIN_SUPPORT && class.predicted == 0)
            .map(|class| {
                format!(
                    "\"{}\" ({} test rows, predicted for none)",
                    class.label, class.support
                )
            })
            .collect();
        self.add(
            ConditionName::NoClassCollapses,
            collapsed.len() as f64,
            0.0,
            collapsed.is_empty(),
            || {
                format!(
                    "the student never predicts some classes: {}",
                    collapsed.join(", ")
                )
            },
        );
    }

    fn add(
        &mut self,
        name: ConditionName,
        value: f64,
        bound: f64,
        passed: bool,
        reason: impl FnOnce() -> String,
    ) {
        if !passed {
            self.passed = false;
            self.reasons.push(reason());
        }
        self.conditions.push(Condition {
            name,
            value,
            bound,
            passed,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::ProblemType;
    use crate::distill::dataset::Label;
    use crate::distill::evaluation::{Calibration, Scoring, evaluate, majority};

    /// 20 rows, the first ten of class a, of which `right` rows of each class are answered right.
    fn student(right_a: usize, right_b: usize) -> Evaluation {
        let answer = |i: usize| match i {
            0..10 if i < right_a => 0,
            10..20 if i - 10 >= right_b => 0,
            _ => 1,
        };
        let logits: Vec<Vec<f32>> = (0..20)
            .map(|i| vec![if answer(i) == 0 { 1.0 } else { 0.0 }, 0.5])
            .collect();
        evaluate(
            Scoring::of(KIND),
            &names(),
            &logits,
            &labels(&test_rows()),
            1,
        )
        .unwrap()
    }

    const KIND: ProblemType = ProblemType::SingleLabelClassification;

    fn names() -> Vec<String> {
        vec!["a".into(), "b".into()]
    }

    fn test_rows() -> Vec<Label> {
        (0..20)
            .map(|i| Label::Class(usize::from(i >= 10)))
            .collect()
    }

    fn labels(rows: &[Label]) -> Vec<Option<&Label>> {
        rows.iter().map(Some).collect()
    }

    fn judge(student: &Evaluation, teacher: Option<&Evaluation>) -> Gate {
        let rows = test_rows();
        let rows = labels(&rows);
        let majority = majority(Scoring::of(KIND), &names(), &rows, &rows, 1).unwrap();
        let spec = GateSpec {
            keep: 0.9,
            ..GateSpec::default()
        };
        Gate::judge(&spec, student, teacher, Some(&majority))
    }

    fn failed(gate: &Gate) -> Vec<ConditionName> {
        let failed = gate.conditions.iter().filter(|condition| !condition.passed);
        failed.map(|condition| condition.name).collect()
    }

    #[test]
    fn a_student_exactly_at_the_bound_passes() {
        let gate = judge(&student(9, 9), Some(&student(10, 10)));
        assert!(gate.passed && gate.reasons.is_empty());
        assert_eq!(gate.conditions.len(), 3);
        let kept = &gate.conditions[0];
        assert_eq!((kept.value, kept.bound), (0.9, 0.9));
    }

    #[test]
    fn a_student_far_below_its_teacher_fails_with_both_scores() {
        let gate = judge(&student(8, 9), Some(&student(10, 10)));
        assert!(!gate.passed);
        assert_eq!(failed(&gate), [ConditionName::KeepsTeacherScore]);
        assert_eq!(
            gate.reasons,
            [
                "the student scores 0.8500 where the teacher scores 1.0000, 85.0 % of it; \
              at least 90.0 % is asked"
            ]
        );
    }

    #[test]
    fn a_pass_without_a_teacher_has_two_conditions() {
        let gate = judge(&student(6, 6), None);
        assert!(gate.passed);
        assert_eq!(gate.conditions.len(), 2);
    }

    #[test]
    fn a_student_no_better_than_the_majority_fails() {
        let gate = judge(&student(5, 5), None);
        assert_eq!(failed(&gate), [ConditionName::BeatsMajority]);
    }

    #[test]
    fn bounds_of_the_request_are_conditions_of_their_own() {
        let mut student = student(9, 9);
        student.calibration = Some(Calibration {
            temperature: 1.5,
            ece: 0.08,
        });
        let judge = |min_score, max_calibration_error| {
            let spec = GateSpec {
                min_score,
                max_calibration_error,
                ..GateSpec::default()
            };
            Gate::judge(&spec, &student, None, None)
        };
        assert!(judge(Some(0.9), Some(0.08)).passed);
        let gate = judge(Some(0.91), Some(0.07));
        assert_eq!(
            failed(&gate),
            [ConditionName::ReachesScore, ConditionName::IsCalibrated]
        );
        let last = gate.conditions.last().unwrap();
        assert_eq!((last.value, last.bound), (0.08, 0.07));
        assert_eq!(gate.reasons.len(), 2);
    }

    #[test]
    fn a_class_that_is_never_predicted_fails_by_name() {
        let gate = judge(&student(10, 0), None);
        assert_eq!(
            failed(&gate),
            [
                ConditionName::BeatsMajority,
                ConditionName::NoClassCollapses
            ]
        );
        assert!(
            gate.reasons[1].contains("\"b\" (10 test rows, predicted for none)"),
            "{:?}",
            gate.reasons
        );
    }

    #[test]
    fn a_class_with_few_test_rows_may_go_unpredicted() {
        let mut student = student(10, 10);
        student.classes[1].predicted = 0;
        student.classes[1].support = MIN_SUPPORT - 1;
        assert!(judge(&student, None).passed);
    }
}
