//! A worker: takes a batch, computes it, hands the rows out.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::model::{Model, TaskSegment};
use super::queue::{Item, Queue};
use super::rate::ServiceRate;
use super::{LiveTask, ServingError};
use crate::telemetry::Metrics;
use crate::text::PackedBatch;

/// Works until the queue is closed and empty.
pub(super) fn work(model: &dyn Model, queue: &Queue, metrics: &Metrics, rate: &ServiceRate) {
    while let Some(mut items) = queue.take() {
        items.retain(|item| item.pending.begin());
        if items.is_empty() {
            continue;
        }
        let items = side_by_side(items);
        let started = Instant::now();
        match compute(model, &items) {
            Ok(rows) => {
                let tokens = items.iter().map(|item| item.sequence.ids.len()).sum();
                let time = started.elapsed();
                metrics.batch(items.len(), tokens, time);
                rate.batch(tokens, time);
                answer(&items, rows);
            }
            Err(reason) => one_by_one(model, &items, &reason),
        }
    }
}

fn answer(items: &[Item], rows: Vec<Vec<f32>>) {
    for (item, row) in items.iter().zip(rows) {
        item.pending.fulfil(item.index, row);
    }
}

/// After a batch has failed: each task alone, so that one that can't be computed fails for itself.
fn one_by_one(model: &dyn Model, items: &[Item], reason: &str) {
    let of_one_version: Vec<_> = by_version(items).collect();
    for own in &of_one_version {
        let outcome = match of_one_version.len() {
            1 => Err(reason.to_owned()),
            _ => compute(model, own),
        };
        match outcome {
            Ok(rows) => answer(own, rows),
            Err(reason) => {
                let task = &own[0].task;
                tracing::error!(reason, ?task, sequences = own.len(), "a batch failed");
                for item in *own {
                    item.pending.fail(ServingError::Failed);
                }
            }
        }
    }
}

/// Puts the sequences of one version next to each other; versions and sequences keep the order in
/// which they came.
fn side_by_side(items: Vec<Item>) -> Vec<Item> {
    let mut groups: Vec<(Arc<LiveTask>, Vec<Item>)> = Vec::new();
    for item in items {
        match groups
            .iter_mut()
            .find(|(task, _)| Arc::ptr_eq(task, &item.task))
        {
            Some((_, group)) => group.push(item),
            None => groups.push((Arc::clone(&item.task), vec![item])),
        }
    }
    groups.into_iter().flat_map(|(_, group)| group).collect()
}

/// Items that stand side by side, parted by version.
fn by_version(items: &[Item]) -> impl Iterator<Item = &[Item]> {
    items.chunk_by(|left, right| Arc::ptr_eq(&left.task, &right.task))
}

fn segments(items: &[Item]) -> Vec<TaskSegment<'_>> {
    let mut start = 0;
    by_version(items)
        .map(|group| {
            let sequences = start..start + group.len();
            start = sequences.end;
            TaskSegment {
                sequences,
                task: &group[0].task,
            }
        })
        .collect()
}

/// The rows of a batch, checked; the error says what went wrong, for the log.
fn compute(model: &dyn Model, items: &[Item]) -> Result<Vec<Vec<f32>>, String> {
    let batch = PackedBatch::new(items.iter().map(|item| &item.sequence));
    let segments = segments(items);
    let rows = catch_unwind(AssertUnwindSafe(|| model.logits(&batch, &segments)))
        .map_err(|panic| format!("panic: {}", message(&*panic)))?
        .map_err(|error| crate::telemetry::chain(&error))?;
    if rows.len() != items.len() {
        return Err(format!("{} rows for {} sequences", rows.len(), items.len()));
    }
    for (item, row) in items.iter().zip(&rows) {
        let labels = item.task.config.labels.len();
        if row.len() != labels || !row.iter().all(|logit| logit.is_finite()) {
            return Err(format!(
                "version {} of {:?} gave logits {row:?} for {labels} labels",
                item.task.version, item.task.name
            ));
        }
    }
    Ok(rows)
}

fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}
