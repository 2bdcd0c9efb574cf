//! The cells of a comparison: one model each, a row and a seed.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::spec::{CompareSpec, CompareSpecError, Method};
use crate::distill::spec::{DataSpec, DistillSpec, LoraSpec, TrainingSpec};

/// Everything that a cell's result depends on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    /// A method's name, or a variant's.
    pub row: String,
    pub method: Method,
    pub task: String,
    /// Catalog name or folder.
    pub encoder: String,
    /// With the cell's own seed.
    pub training: TrainingSpec,
    pub lora: LoraSpec,
    /// The adapter that the row has as it is: nothing is trained.
    pub ready: Option<String>,
    /// Name and digest of the cell whose answers it learns from.
    pub teacher: Option<(String, String)>,
    pub data: DataSpec,
    /// Cuts the splits.
    pub data_seed: u64,
    /// The teacher's encoder and, if it was not trained here, its adapter, which gives the labels.
    pub teacher_model: String,
    pub teacher_adapter: Option<String>,
}

impl Cell {
    /// The name of its files.
    pub fn name(&self) -> String {
        match self.ready {
            Some(_) => self.row.clone(),
            None => format!("{}-{}", self.row, self.training.seed),
        }
    }

    pub fn digest(&self) -> String {
        let text = serde_json::to_string(self).unwrap_or_default();
        format!("{:.32}", format!("{:x}", Sha256::digest(text)))
    }
}

/// The cells, each behind the one that it learns from.
pub fn cells(spec: &CompareSpec, student: &str) -> Result<Vec<Cell>, CompareSpecError> {
    let planner = Planner {
        spec,
        student: match &spec.pass.student {
            Some(student) => student.name(),
            None => student.to_owned(),
        },
    };
    let mut cells: Vec<Cell> = Vec::new();
    let distils = |method: &Method| *method == Method::KdLoraStudent;
    let variants = &spec.variants;
    let needs_teacher = spec.rows.iter().any(distils) || variants.iter().any(|v| distils(&v.of));
    let teacher_rows = Method::ALL.into_iter().filter(|method| {
        spec.rows.contains(method) || *method == Method::LoraTeacher && needs_teacher
    });
    for method in teacher_rows.filter(|method| method.is_teacher()) {
        for seed in planner.seeds(method) {
            cells.push(planner.cell(method.name(), method, &spec.pass, seed, None)?);
        }
    }
    let teachers: Vec<(String, String)> = cells
        .iter()
        .filter(|cell| cell.method == Method::LoraTeacher)
        .map(|cell| (cell.name(), cell.digest()))
        .collect();
    let rows = Method::ALL
        .into_iter()
        .filter(|m| spec.rows.contains(m) && !m.is_teacher());
    for method in rows {
        let pass = spec.pass_of(method);
        for (i, seed) in planner.seeds(method).into_iter().enumerate() {
            let teacher = teachers.get(i % teachers.len().max(1));
            cells.push(planner.cell(method.name(), method, &pass, seed, teacher)?);
        }
    }
    for variant in variants {
        let pass = spec.varied(variant)?;
        for (i, seed) in planner.seeds(variant.of).into_iter().enumerate() {
            let teacher = teachers.get(i % teachers.len().max(1));
            cells.push(planner.cell(&variant.name, variant.of, &pass, seed, teacher)?);
        }
    }
    Ok(cells)
}

struct Planner<'a> {
    spec: &'a CompareSpec,
    student: String,
}

impl Planner<'_> {
    fn seeds(&self, method: Method) -> Vec<u64> {
        let teacher = self.spec.pass.teacher.as_ref();
        let ready = teacher.is_some_and(|teacher| teacher.adapter.is_some());
        match &self.spec.teacher_seeds {
            _ if method == Method::LoraTeacher && ready => self.spec.seeds[..1].to_vec(),
            Some(seeds) if method.is_teacher() => seeds.clone(),
            _ => self.spec.seeds.clone(),
        }
    }

    fn cell(
        &self,
        row: &str,
        method: Method,
        pass: &DistillSpec,
        seed: u64,
        teacher_cell: Option<&(String, String)>,
    ) -> Result<Cell, CompareSpecError> {
        let teacher = pass.teacher.as_ref().ok_or(CompareSpecError::NoTeacher)?;
        let mut training = TrainingSpec {
            seed,
            ..pass.training.clone()
        };
        let distils = method == Method::KdLoraStudent;
        if !distils {
            training = training.without_teacher();
        }
        let mut lora = pass.lora.clone();
        match method {
            Method::KdLoraStudent | Method::LoraStudent => {}
            Method::FftTeacher => self.spec.full.teacher.apply(&mut training),
            Method::FftStudent => self.spec.full.student.apply(&mut training),
            Method::LoraTeacher => {
                if let Some(finetune) = &teacher.finetune {
                    training = finetune.training(&training);
                    lora = finetune.lora.clone();
                }
            }
        }
        let ready = teacher.adapter.clone();
        Ok(Cell {
            row: row.to_owned(),
            method,
            task: pass.task.clone(),
            encoder: match method.is_teacher() {
                true => teacher.model.clone(),
                false => self.student.clone(),
            },
            training,
            lora,
            ready: ready.filter(|_| method == Method::LoraTeacher),
            teacher: teacher_cell.filter(|_| distils).cloned(),
            data: pass.data.clone(),
            data_seed: self.spec.pass.training.seed,
            teacher_model: teacher.model.clone(),
            teacher_adapter: teacher.adapter.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::spec::tests::spec;
    use super::*;

    fn names(cells: &[Cell]) -> Vec<String> {
        cells.iter().map(Cell::name).collect()
    }

    #[test]
    fn teachers_stand_before_those_who_learn_from_them() {
        let spec = spec(json!({
            "seeds": [1, 2, 3], "teacher_seeds": [7, 8], "rows": ["kd-lora-student"],
        }));
        let cells = cells(&spec, "small").unwrap();
        let expected = [
            "lora-teacher-7",
            "lora-teacher-8",
            "kd-lora-student-1",
            "kd-lora-student-2",
            "kd-lora-student-3",
        ];
        assert_eq!(names(&cells), expected);
        let teachers: Vec<_> = cells[2..]
            .iter()
            .map(|cell| cell.teacher.as_ref().unwrap().0.as_str())
            .collect();
        assert_eq!(
            teachers,
            ["lora-teacher-7", "lora-teacher-8", "lora-teacher-7"]
        );
    }

    #[test]
    fn rows_differ_in_what_they_are_named_for() {
        let spec = spec(json!({
            "seeds": [5],
            "pass": {"training": {"epochs": 9, "label_repeats": 3}},
            "full": {"student": {"epochs": 3, "learning_rate": 0.001}},
            "variants": [{"name": "dora", "patch": {"lora": {"r": 4}}}],
        }));
        let cells = cells(&spec, "default").unwrap();
        let cell = |name: &str| cells.iter().find(|cell| cell.row == name).unwrap();
        assert_eq!(cells.len(), 6);
        assert_eq!(cell("fft-teacher").encoder, "large");
        assert_eq!(cell("lora-teacher").training.epochs, 2);
        assert_eq!(cell("fft-student").encoder, "small");
        assert_eq!(cell("fft-student").training.learning_rate, 0.001);
        assert_eq!(cell("lora-student").training.epochs, 9);
        assert!(cell("lora-student").teacher.is_none());
        assert_eq!(cell("lora-student").training.alpha, 0.0);
        assert_eq!(cell("kd-lora-student").training.alpha, 0.5);
        let repeats = |name| cell(name).training.label_repeats;
        assert_eq!(
            (repeats("lora-student"), repeats("kd-lora-student")),
            (1, 3)
        );
        assert_eq!(cell("kd-lora-student").training.epochs, 9);
        assert_eq!(cell("dora").lora.r, 4);
        assert!(cell("dora").teacher.is_some());
        assert!(cells.iter().all(|cell| cell.data_seed == 42));
    }

    #[test]
    fn the_control_may_have_a_schedule_of_its_own() {
        let spec = spec(json!({
            "seeds": [5],
            "pass": {"training": {"epochs": 2}},
            "rows": ["lora-student", "kd-lora-student"],
            "control": {"epochs": 3, "learning_rate": 0.002},
            "variants": [
                {"name": "long", "of": "lora-student", "patch": {"training": {"epochs": 9}}},
            ],
        }));
        let cells = cells(&spec, "small").unwrap();
        let schedule = |row: &str| {
            let cell = cells.iter().find(|cell| cell.row == row).unwrap();
            (cell.training.epochs, cell.training.learning_rate)
        };
        assert_eq!(schedule("lora-student"), (3, 0.002));
        assert_eq!(schedule("kd-lora-student"), (2, 0.001));
        assert_eq!(schedule("long"), (9, 0.002));
    }

    #[test]
    fn a_ready_made_teacher_is_one_cell() {
        let spec = spec(json!({
            "pass": {"teacher": {"adapter": "mood", "finetune": null}},
            "rows": ["lora-teacher", "kd-lora-student"],
        }));
        let cells = cells(&spec, "small").unwrap();
        assert_eq!(cells.len(), 4);
        assert_eq!(cells[0].name(), "lora-teacher");
        assert_eq!(cells[0].ready.as_deref(), Some("mood"));
        assert_eq!(cells[0].training.epochs, 4, "of no consequence");
    }

    #[test]
    fn a_digest_follows_everything_that_the_result_depends_on() {
        let of = |patch| {
            let cells = cells(&spec(patch), "small").unwrap();
            cells.last().unwrap().digest()
        };
        let plain = of(json!({}));
        assert_eq!(plain, of(json!({})));
        assert_ne!(plain, of(json!({"pass": {"training": {"epochs": 5}}})));
        // Through the teacher.
        let other = json!({"pass": {"teacher": {"finetune": {"epochs": 3}}}});
        assert_ne!(plain, of(other));
    }
}
