//! Whether a version is good enough to go live.

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
}

impl Gate {
    /// Judges the student. A pass without a teacher has no teacher's score to keep.
    pub fn judge(
        spec: &GateSpec,
        student: &Evaluation,
        teacher: Option<&Evaluation>,
        majority: &Evaluation,
    ) -> Self {
        let mut gate = Self {
            passed: true,
            conditions: Vec::new(),
            reasons: Vec::new(),
        };
        if let Some(teacher) = teacher {
            gate.keeps_teacher_score(spec.keep, student.score.value, teacher.score.value);
        }
        gate.beats_majority(student.score.value, majority.score.value);
        gate.no_class_collapses(student);
        gate
    }

    fn keeps_teacher_score(&mut self, keep: f64, student: f64, teacher: f64) {
        // Scores are rounded so that a student exactly at the bound passes.
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
