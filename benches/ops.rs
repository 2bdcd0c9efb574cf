//! The ops of a MiniLM-sized layer on one core: `cargo bench --bench ops`.
//!
//! Throughput of products is in multiplications and additions: Gelem/s are GFLOP/s. The peak that
//! they stand beside is a large square product's, by the `gemm` crate or in packed panels.

use std::collections::BTreeSet;
use std::hint::black_box;

use candle_core::{Device, Result, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kdlora::ops::{
    self, Activation, AttentionShape, Borders, EmbedIndices, Linear, LoraUpdate, Norm,
    PackedLinear, Positions, Precision, RowUpdates,
};

const HIDDEN: usize = 384;
const HEADS: usize = 12;
const WORDS: usize = 30_522;
const RANK: usize = 8;
/// Tokens of a lone sentence, and of a batch.
const ROWS: [usize; 2] = [27, 256];

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 0.5, shape, &Device::Cpu).expect("host memory")
}

fn layer(out: usize, input: usize) -> Linear {
    Linear {
        weight: random(&[out, input]),
        bias: Some(random(&[out])),
    }
}

fn peak(c: &mut Criterion) {
    let size = 768;
    let mut group = c.benchmark_group("peak");
    group.throughput(Throughput::Elements(2 * (size * size * size) as u64));
    let layer = Linear {
        weight: random(&[size, size]),
        bias: None,
    };
    let x = random(&[size, size]);
    group.bench_function("gemm", |b| {
        b.iter(|| ops::linear(black_box(&x), &layer, Activation::None));
    });
    for precision in [Precision::F32, Precision::Int8] {
        let packed = PackedLinear::new(&layer, precision).expect("a frozen linear");
        group.bench_function(format!("packed {precision:?}"), |b| {
            b.iter(|| ops::packed_linear(black_box(&x), &packed, &[], Activation::None));
        });
    }
    group.finish();
}

fn linears(c: &mut Criterion) {
    for (out, input, activation) in [
        (3 * HIDDEN, HIDDEN, Activation::None),
        (HIDDEN, HIDDEN, Activation::None),
        (4 * HIDDEN, HIDDEN, Activation::Gelu),
        (HIDDEN, 4 * HIDDEN, Activation::None),
    ] {
        let layer = layer(out, input);
        let packed = [Precision::F32, Precision::Int8]
            .map(|precision| PackedLinear::new(&layer, precision).expect("a frozen linear"));
        let mut group = c.benchmark_group(format!("linear {out}x{input}"));
        for rows in ROWS {
            let x = random(&[rows, input]);
            group.throughput(Throughput::Elements(2 * (rows * out * input) as u64));
            group.bench_function(BenchmarkId::new("gemm", rows), |b| {
                b.iter(|| ops::linear(black_box(&x), &layer, activation));
            });
            for (name, packed) in ["packed f32", "packed int8"].iter().zip(&packed) {
                group.bench_function(BenchmarkId::new(*name, rows), |b| {
                    b.iter(|| ops::packed_linear(black_box(&x), packed, &[], activation));
                });
            }
        }
        group.finish();
    }
}

/// Sequences of 27 tokens, as many as there are rows for.
fn borders(rows: usize) -> Borders {
    let offsets: Vec<usize> = (0..=rows / ROWS[0]).map(|i| i * ROWS[0]).collect();
    Borders::new(&offsets, None)
}

fn others(c: &mut Criterion) -> Result<()> {
    let norm = Norm {
        gamma_beta: random(&[2, HIDDEN]),
        eps: 1e-12,
    };
    let update = || LoraUpdate {
        a: random(&[RANK, HIDDEN]),
        b: random(&[HIDDEN, RANK]),
        scale: 2.0,
        column: 0,
        map: None,
    };
    let packed = PackedLinear::new(&layer(3 * HIDDEN, HIDDEN), Precision::F32)?;
    let tables = [WORDS, 512, 2].map(|count| random(&[count, HIDDEN]));
    for sequences in [1, 9] {
        let rows = sequences * ROWS[0];
        let mut group = c.benchmark_group(format!("{rows} tokens"));
        group.throughput(Throughput::Elements(rows as u64));
        let qkv = random(&[rows, 3 * HIDDEN]);
        group.bench_function("attention", |b| {
            b.iter(|| {
                let shape = AttentionShape {
                    offsets: borders(rows),
                    heads: HEADS,
                    scale: 1.0 / ((HIDDEN / HEADS) as f32).sqrt(),
                    positions: Positions::None,
                };
                ops::attention(black_box(&qkv), None, &[], shape)
            });
        });
        let (x, residual) = (random(&[rows, HIDDEN]), random(&[rows, HIDDEN]));
        group.bench_function("add and norm", |b| {
            b.iter(|| ops::add_norm(black_box(&x), None, &residual, &norm));
        });
        let indices = EmbedIndices {
            word: (0..rows as u32).map(|i| i * 97 % WORDS as u32).collect(),
            position: (0..rows).map(|i| (i % ROWS[0]) as u32).collect(),
            token_type: std::iter::repeat_n(0, rows).collect(),
            on_device: None,
        };
        group.bench_function("embed", |b| {
            b.iter(|| {
                ops::embed(
                    &tables[0],
                    &tables[1],
                    &tables[2],
                    black_box(indices.clone()),
                )
            });
        });
        // One adapter of rank 8 on the query for all rows, or one for each sequence.
        for adapters in BTreeSet::from([1, sequences]) {
            let each = rows / adapters;
            let updates = (0..adapters)
                .map(|i| RowUpdates {
                    rows: i * each..(i + 1) * each,
                    updates: [update()].into(),
                })
                .collect::<Vec<_>>();
            let id = BenchmarkId::new("linear with adapters", adapters);
            group.bench_function(id, |b| {
                b.iter(|| ops::packed_linear(black_box(&x), &packed, &updates, Activation::None));
            });
        }
        group.finish();
    }
    Ok(())
}

fn all(c: &mut Criterion) {
    peak(c);
    linears(c);
    others(c).expect("host memory");
}

criterion_group!(benches, all);
criterion_main!(benches);
