//! Runs what is missing of a comparison, one process after the other, and writes its table.

use std::path::Path;
use std::process::ExitStatus;

use super::CompareError;
use super::cell::{Order, Outcome, Trained, Work, load_data};
use super::files::{self, Files};
use super::latency::{self, Latencies};
use super::picture;
use super::plan::{Cell, cells};
use super::spec::{CompareSpec, Method};
use super::table::Comparison;
use crate::distill::models::Places;

/// What a comparison does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Counted from 1, of all cells and the measurement of latency.
    pub number: usize,
    pub total: usize,
    pub name: String,
    pub what: &'static str,
}

/// Makes the comparison in `folder`, which may hold parts of it already, and returns its table.
/// The table is also written there, as `compare.json`, `compare.md` and `compare.svg`.
///
/// `process` runs a process that [carries out](super::carry_out) the order in the file that it
/// gets, with the same `places`, and waits for its end.
pub fn run(
    spec: &CompareSpec,
    places: &Places,
    folder: &Path,
    process: &mut dyn FnMut(&Path) -> std::io::Result<ExitStatus>,
    announce: &mut dyn FnMut(Announcement),
) -> Result<Comparison, CompareError> {
    spec.validate()?;
    let cells = cells(spec, &places.student)?;
    let files = Files::new(folder);
    let mut foreman = Foreman {
        folder,
        files: &files,
        process,
    };
    // What is wrong with the data is said before anything is trained.
    let data = match cells.first() {
        Some(cell) => load_data(cell, places)?,
        None => return Err(super::CompareSpecError::Empty("rows").into()),
    };
    let total = cells.len() + 1;
    let mut outcomes = Vec::with_capacity(cells.len());
    for (i, cell) in cells.iter().enumerate() {
        let mut say = |what| {
            announce(Announcement {
                number: i + 1,
                total,
                name: cell.name(),
                what,
            });
        };
        outcomes.push(foreman.outcome(cell, &mut say)?);
    }
    let measured = one_of_each_row(&cells);
    let latencies: Option<Latencies> = known(&files.latency());
    let latencies = match latencies {
        Some(latencies) if latencies.digest == latency::digest(&measured) => latencies,
        _ => {
            announce(Announcement {
                number: total,
                total,
                name: "all rows".into(),
                what: "measuring latency",
            });
            foreman.order("the latency", Work::Latency(measured))?;
            files::read(&files.latency())?
        }
    };
    let comparison = Comparison::new(spec, &data, &cells, outcomes, &latencies)?;
    files::write_text(
        &files.report("json"),
        &serde_json::to_vec_pretty(&comparison).map_err(std::io::Error::from)?,
    )?;
    files::write_text(&files.report("md"), comparison.to_markdown().as_bytes())?;
    files::write_text(&files.report("svg"), picture::svg(&comparison).as_bytes())?;
    Ok(comparison)
}

/// The first cell of each row.
fn one_of_each_row(cells: &[Cell]) -> Vec<Cell> {
    let mut rows: Vec<Cell> = Vec::new();
    for cell in cells {
        if rows.iter().all(|known| known.row != cell.row) {
            rows.push(cell.clone());
        }
    }
    rows
}

/// The content of a file, if it is there and whole.
fn known<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    match files::read(path) {
        Ok(content) => Some(content),
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!(%error, "made anew");
            }
            None
        }
    }
}

struct Foreman<'a> {
    folder: &'a Path,
    files: &'a Files,
    process: &'a mut dyn FnMut(&Path) -> std::io::Result<ExitStatus>,
}

impl Foreman<'_> {
    /// The result of a cell, known or made.
    fn outcome(
        &mut self,
        cell: &Cell,
        say: &mut dyn FnMut(&'static str),
    ) -> Result<Outcome, CompareError> {
        let name = cell.name();
        let path = self.files.outcome(&name);
        let is_teacher = cell.method == Method::LoraTeacher;
        let outcome: Option<Outcome> = known(&path);
        let answered = !is_teacher || self.files.logits(&name).is_file();
        if let Some(outcome) = outcome
            && outcome.digest == cell.digest()
            && answered
        {
            return Ok(outcome);
        }
        let trained: Option<Trained> = known(&self.files.trained(&name));
        let is_trained = trained.is_some_and(|trained| trained.digest == cell.digest());
        if cell.ready.is_none() && !(is_trained && self.files.model(&name).is_dir()) {
            say("training");
            self.order(&name, Work::Train(cell.clone()))?;
        }
        say("scoring");
        self.order(&name, Work::Evaluate(cell.clone()))?;
        if cell.method.is_full() {
            // A whole encoder: hundreds of megabytes that nothing needs any more.
            files::remove(&self.files.model(&name))?;
        }
        Ok(files::read(&path)?)
    }

    fn order(&mut self, name: &str, work: Work) -> Result<(), CompareError> {
        let order = Order {
            folder: self.folder.to_owned(),
            work,
        };
        let path = self.files.order();
        files::write(&path, &order)?;
        let status = (self.process)(&path)?;
        files::remove(&path)?;
        match status.success() {
            true => Ok(()),
            false => Err(CompareError::Process {
                cell: name.to_owned(),
                status,
            }),
        }
    }
}
