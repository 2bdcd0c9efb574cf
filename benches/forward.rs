//! Whole forwards of the ready-made tasks' student: `cargo bench --bench forward`.
//!
//! Needs the encoder that `kdlora serve` fetches at its first start (or `kdlora pull minilm-l6`).
//! Texts are those of the test split. `leading` is with the idle cores' help, as a lone request has
//! it; `workers` are as many threads, each with a batch of its own, as under load; all else runs on
//! one core. Throughput of `workers` is in multiplications and additions of the linears and of
//! attention: Gelem/s are GFLOP/s, to hold beside the `peak` of `cargo bench --bench ops`.

mod texts;

use std::collections::BTreeSet;
use std::hint::black_box;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use candle_core::Device;
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use kdlora::adapter::{AdapterFolder, Classifier};
use kdlora::encoder::{Encoder, EncoderConfig, Segment};
use kdlora::hub;
use kdlora::ops::{Crew, Precision};
use kdlora::text::{PackedBatch, Tokenizer};
use texts::TASK;

/// Multiplications and additions of a forward: behind its attention the last layer works on first
/// tokens alone. LoRA, norms, softmax and the head are not counted.
fn flops(config: &EncoderConfig, batch: &PackedBatch) -> u64 {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let layers = config.num_hidden_layers;
    let (tokens, sequences) = (batch.tokens(), batch.sequences());
    let pairs: usize = (0..sequences).map(|i| batch.span(i).len().pow(2)).sum();
    let attend = tokens * 3 * hidden * hidden + 2 * pairs * hidden;
    let finish = hidden * hidden + 2 * hidden * wide;
    let rows = (layers - 1) * tokens + sequences;
    2 * (layers * attend + rows * finish) as u64
}

/// Batches of about 128 tokens on all cores, each thread its own.
fn workers(group: &mut BenchmarkGroup<'_, WallTime>, classifier: &Classifier, batch: &PackedBatch) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for workers in BTreeSet::from([1, cores]) {
        let flops = flops(classifier.encoder.config(), batch);
        group.throughput(Throughput::Elements(workers as u64 * flops));
        let id = BenchmarkId::new("merged, 128 tokens, workers", workers);
        group.bench_function(id, |b| {
            b.iter_custom(|iterations| {
                let together = Barrier::new(workers);
                let work = || {
                    together.wait();
                    let start = Instant::now();
                    for _ in 0..iterations {
                        black_box(classifier.logits(black_box(batch))).expect("it fits");
                    }
                    start.elapsed()
                };
                std::thread::scope(|scope| {
                    let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
                    let times = threads.into_iter().map(|thread| thread.join());
                    times.map(|time| time.expect("no panic")).max()
                })
                .expect("a worker")
            });
        });
    }
}

fn forwards(c: &mut Criterion) {
    let cache = hub::cache_dir().expect("a home");
    let folder = hub::resolve("minilm-l6", &cache)
        .expect("the encoder; fetch it with: cargo run --release -- pull minilm-l6");
    let tokenizer = Tokenizer::load(&folder).expect("a tokenizer");
    let sequences = texts::sequences(&tokenizer);
    let adapter = format!("models/adapters/{TASK}/student");
    let adapter = AdapterFolder::read(Path::new(&adapter)).expect("an adapter");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let crew = Crew::start(cores).expect("threads");
    for (name, precision) in [("f32", Precision::F32), ("int8", Precision::Int8)] {
        let encoder = Encoder::load(&folder, &Device::Cpu).expect("an encoder");
        let encoder = Arc::new(encoder.pack(precision).expect("memory"));
        let hot = Classifier::from_adapter(Arc::clone(&encoder), &adapter).expect("it fits");
        let merged = Classifier::merged(&encoder, &adapter).expect("it fits");
        let mut group = c.benchmark_group(format!("forward {name}"));
        for count in [1, 4, 32] {
            let batch = PackedBatch::new(&sequences[..count]);
            group.throughput(Throughput::Elements(batch.tokens() as u64));
            for (mode, classifier) in [("hot", &hot), ("merged", &merged)] {
                group.bench_function(BenchmarkId::new(mode, count), |b| {
                    b.iter(|| classifier.logits(black_box(&batch)));
                });
            }
            // Each sequence of another task, as far as the encoder can tell.
            let segments: Vec<_> = (0..count)
                .map(|i| Segment {
                    sequences: i..i + 1,
                    weights: &hot.weights,
                })
                .collect();
            group.bench_function(BenchmarkId::new("hot, a task each", count), |b| {
                b.iter(|| encoder.logits(black_box(&batch), &segments));
            });
            if count == 1 {
                group.bench_function(BenchmarkId::new("hot, leading", count), |b| {
                    b.iter(|| crew.lead(|| hot.logits(black_box(&batch))));
                });
            }
        }
        let few = sequences.iter().scan(0, |tokens, sequence| {
            *tokens += sequence.ids.len();
            (*tokens <= 128).then_some(sequence)
        });
        workers(&mut group, &merged, &PackedBatch::new(few));
        group.finish();
    }
}

criterion_group!(benches, forwards);
criterion_main!(benches);
