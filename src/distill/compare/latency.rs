//! Latency of a model of each row, in turns, so that all meet the same machine.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::CompareError;
use super::cell::{load_data, load_model};
use super::files::{self, Files};
use super::plan::Cell;
use crate::distill::evaluation::{Call, Quantiles, measure_in_turns, quantiles};
use crate::distill::models::{Base, Places};
use crate::distill::pass::{Listener, forward};
use crate::distill::progress::{Event, Stage, Step};
use crate::encoder::{Encoder, EncoderError, HeadNames, TaskWeights};
use crate::text::Sequence;

/// Batch size, rounds that are not counted, rounds that are.
const ROUNDS: [(usize, usize, usize); 2] = [(1, 3, 60), (32, 1, 8)];

/// Latency of every row: a forward pass, on a CPU on one thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Latencies {
    /// Of the cells that were measured, together.
    pub digest: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// By row.
    pub rows: BTreeMap<String, RowLatency>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RowLatency {
    pub batch_1: Quantiles,
    pub batch_32: Quantiles,
}

/// The digest of cells that are measured together.
pub(super) fn digest(cells: &[Cell]) -> String {
    let digests: Vec<String> = cells.iter().map(Cell::digest).collect();
    digests.join(" ")
}

struct Model {
    row: String,
    encoder: Arc<Encoder>,
    weights: TaskWeights,
    /// The test rows.
    sequences: Vec<Sequence>,
}

/// Measures one cell of each row and writes the file of [`Latencies`].
pub(super) fn measure(
    cells: &[Cell],
    files: &Files,
    places: &Places,
    listener: Listener<'_>,
) -> Result<(), CompareError> {
    let Some(first) = cells.first() else {
        return Ok(());
    };
    let data = load_data(first, places)?;
    let labels = data.label_names.len();
    // Rows of one encoder share it.
    let mut bases: BTreeMap<&str, Base> = BTreeMap::new();
    let mut models = Vec::new();
    for cell in cells {
        if !bases.contains_key(cell.encoder.as_str()) {
            bases.insert(&cell.encoder, Base::load(&cell.encoder, places)?);
        }
        let Some(base) = bases.get(cell.encoder.as_str()) else {
            continue;
        };
        let max_length = base.max_length(cell.training.max_length);
        let sequences = base.sequences(data.test.iter(), max_length, cell.training.truncation)?;
        let (encoder, weights) = match cell.method.is_full() {
            // Its time does not depend on what the weights are.
            true => (base.encoder.clone(), plain(&base.encoder, labels)?),
            false => {
                let loaded = load_model(cell, files, places)?;
                (loaded.classifier.encoder, loaded.classifier.weights)
            }
        };
        models.push(Model {
            row: cell.row.clone(),
            encoder,
            weights,
            sequences,
        });
    }
    listener(Event::Stage {
        stage: Stage::Latency,
    });
    let start = Instant::now();
    let total: usize = ROUNDS
        .iter()
        .map(|(_, warm_up, rounds)| warm_up + rounds)
        .sum();
    let mut calls: Vec<_> = models
        .iter()
        .map(|model| {
            move |ids: &[&usize]| {
                let rows = ids.iter().map(|id| &model.sequences[**id]);
                forward(&model.encoder, &model.weights, rows)
            }
        })
        .collect();
    let mut calls: Vec<Call<'_, usize, EncoderError>> =
        calls.iter_mut().map(|call| call as _).collect();
    let ids: Vec<usize> = (0..data.test.len()).collect();
    let mut rounds_done = 0;
    let mut times = Vec::new();
    for (batch, warm_up, rounds) in ROUNDS {
        let mut done = || {
            rounds_done += 1;
            let seconds = start.elapsed().as_secs_f64();
            listener(Event::Step(Step {
                step: rounds_done,
                steps: total,
                loss: None,
                tokens_per_second: 0.0,
                eta_seconds: seconds / rounds_done as f64 * (total - rounds_done) as f64,
                gpu_peak_bytes: None,
            }));
        };
        times.push(measure_in_turns(
            &mut calls, &ids, batch, warm_up, rounds, &mut done,
        )?);
    }
    let rows = models.iter().enumerate().map(|(i, model)| {
        let latency = RowLatency {
            batch_1: quantiles(&mut times[0][i].clone()),
            batch_32: quantiles(&mut times[1][i].clone()),
        };
        (model.row.clone(), latency)
    });
    let latencies = Latencies {
        digest: digest(cells),
        device: places.placement.device_name(),
        rows: rows.collect(),
    };
    Ok(files::write(&files.latency(), &latencies)?)
}

/// A head of zeros.
fn plain(encoder: &Encoder, labels: usize) -> Result<TaskWeights, EncoderError> {
    let (hidden, device) = (encoder.config().hidden_size, encoder.device());
    let names = HeadNames::of(encoder.config().family);
    let mut head = BTreeMap::new();
    for (name, out) in [(names.dense, hidden), (names.projection, labels)] {
        let weight = Tensor::zeros((out, hidden), DType::F32, device)?;
        head.insert(format!("{name}.weight"), weight);
        let bias = Tensor::zeros(out, DType::F32, device)?;
        head.insert(format!("{name}.bias"), bias);
    }
    TaskWeights::new(encoder, Vec::new(), head)
}
