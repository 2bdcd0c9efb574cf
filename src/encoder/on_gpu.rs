//! Encoders on a GPU: what crosses the bus, and what stays in its memory. They need a GPU:
//! `tests/gpu.sh`, or `cargo test --features cuda --lib on_gpu -- --ignored`.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;

use super::{Placement, Segment};
use crate::adapter::{AdapterFolder, Classifier};
use crate::ops::device;
use crate::text::{PackedBatch, Sequence};

/// A tiny encoder with two tasks, in bf16.
fn tasks() -> [Classifier; 2] {
    let golden = Path::new("tests/golden");
    let gpu = device::open_cuda(0).expect("a GPU");
    let placement = Placement::gpu(gpu, DType::BF16);
    let encoder = placement.load_for_inference(&golden.join("models/bert-pairs"));
    let encoder = Arc::new(encoder.expect("an encoder"));
    ["bert-pairs-qv", "bert-pairs-pooler"].map(|name| {
        let adapter = AdapterFolder::read(&golden.join("adapters").join(name)).expect("it reads");
        Classifier::from_adapter(Arc::clone(&encoder), &adapter).expect("it fits")
    })
}

/// A batch of these lengths; the first sequences are the first task's.
fn answer(tasks: &[Classifier; 2], lengths: &[usize]) -> Vec<Vec<f32>> {
    let sequences = lengths.iter().map(|length| Sequence {
        ids: (0..*length as u32).map(|i| 4 + i % 50).collect(),
        type_ids: vec![0; *length],
        truncated: false,
    });
    let sequences: Vec<Sequence> = sequences.collect();
    let middle = lengths.len() / 2;
    let segments = [(0..middle, &tasks[0]), (middle..lengths.len(), &tasks[1])];
    let segments = segments.into_iter().filter(|(range, _)| !range.is_empty());
    let segments: Vec<Segment<'_>> = segments
        .map(|(sequences, task)| Segment {
            sequences,
            weights: &task.weights,
        })
        .collect();
    let batch = PackedBatch::new(&sequences);
    let rows = tasks[0].encoder.logits(&batch, &segments);
    rows.expect("logits")
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_batch_is_one_copy_there_and_one_back() {
    let tasks = tasks();
    answer(&tasks, &[3, 9, 30, 4]);
    let (to_device, to_host) = device::copies();
    for _ in 0..10 {
        answer(&tasks, &[3, 9, 30, 4]);
    }
    assert_eq!(device::copies(), (to_device + 10, to_host + 10));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn ten_thousand_batches_of_any_shape_leave_nothing_behind() {
    let tasks = tasks();
    let gpu = tasks[0].encoder.device();
    let most = tasks[0].encoder.config().max_sequence_length();
    let mut state = 1u64;
    let mut draw = |most: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        1 + (state >> 33) as usize % most
    };
    let mut batches = |count: usize| {
        for _ in 0..count {
            let lengths: Vec<usize> = (0..draw(64)).map(|_| draw(most)).collect();
            let rows = answer(&tasks, &lengths);
            assert!(rows.iter().flatten().all(|logit| logit.is_finite()));
        }
        device::wait(gpu).expect("a GPU");
        device::memory(gpu).expect("its memory")
    };
    batches(1000);
    // The heaviest batch that there can be: the pool knows no larger one.
    answer(&tasks, &[most; 64]);
    let before = batches(0);
    let after = batches(10_000);
    assert_eq!(after.used, before.used);
    assert!(
        after.reserved <= before.reserved,
        "{after:?}, before {before:?}"
    );
}
