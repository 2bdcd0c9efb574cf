//! Forwards of a student and a teacher on a device: `cargo bench --features cuda --bench device --
//! --student DIR --teacher DIR`. Prints one JSON object per line with name, value and unit; each
//! value is the median of five rounds. `tests/gpu.sh` runs it beside PyTorch.
//!
//! Texts are those of the test split of movie-sentiment, several times over, sorted by length or in
//! the order of the file. Tokens are made beforehand. "End to end" is from tokens to logits in host
//! memory; for "GPU only" the batches are packed beforehand. The teacher reads the student's tokens:
//! only its speed counts.

mod texts;

use std::collections::VecDeque;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::DType;
use clap::Parser;
use kdlora::adapter::{AdapterFolder, Classifier};
use kdlora::encoder::{Encoder, Logits, Placement, Segment};
use kdlora::ops::{Precision, device};
use kdlora::text::{PackedBatch, Sequence, Tokenizer};
use serde_json::json;
use texts::TASK;

const ROUNDS: usize = 5;
/// Forwards of one text that are timed, after those that are not.
const LONE: usize = 400;
const WARM_UP: usize = 100;
/// Adapters that answer in one batch.
const ADAPTERS: usize = 100;

#[derive(Parser)]
struct Args {
    /// Folder of the student's encoder.
    #[arg(long)]
    student: PathBuf,
    /// Folder of a teacher's encoder; its weights may be random.
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// `cpu` or the number of a GPU.
    #[arg(long, default_value = "0")]
    device: String,
    /// Times that the texts are repeated.
    #[arg(long, default_value_t = 20)]
    repeat: usize,
    /// Only the first of the texts.
    #[arg(long)]
    texts: Option<usize>,
    /// Tokens of a batch.
    #[arg(long, default_value_t = 16_384)]
    batch_tokens: usize,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let placement = match args.device.parse() {
        Ok(ordinal) => {
            let gpu = device::open_cuda(ordinal).expect("a GPU");
            Placement::gpu(gpu, DType::BF16)
        }
        Err(_) => Placement::cpu(Precision::F32),
    };
    say(
        "device",
        json!(placement.device_name()),
        placement.dtype_name(),
    );
    let tokenizer = Tokenizer::load(&args.student).expect("a tokenizer");
    let mut texts = texts::sequences(&tokenizer);
    texts.truncate(args.texts.unwrap_or(texts.len()));
    let mut repeated: Vec<&Sequence> = (0..args.repeat).flat_map(|_| &texts).collect();
    let in_order = batches(&repeated, args.batch_tokens);
    repeated.sort_by_key(|sequence| sequence.ids.len());
    let sorted = batches(&repeated, args.batch_tokens);

    let (encoder, task) = load(&placement, &args.student);
    throughput("student sorted", &encoder, &sorted, |_| vec![&task]);
    throughput("student in order", &encoder, &in_order, |_| vec![&task]);
    lone_latency(&encoder, &texts, &task);
    agreement(&args.student, &encoder, &task, &texts);

    let folder = adapter();
    let classifiers: Vec<Classifier> = (0..ADAPTERS)
        .map(|_| Classifier::from_adapter(Arc::clone(&encoder), &folder).expect("it fits"))
        .collect();
    let all = |sequences: usize| classifiers.iter().take(sequences).collect();
    throughput("100 adapters sorted", &encoder, &sorted, all);
    drop(classifiers);

    if let Some(memory) = device::memory(placement.device()) {
        say("student peak memory", json!(memory.peak >> 20), "MiB");
    }

    let merged = Classifier::merged(&encoder, &folder).expect("it fits");
    throughput("student merged sorted", &merged.encoder, &sorted, |_| {
        vec![&merged]
    });
    drop(merged);

    if let Some(dir) = &args.teacher {
        let encoder = Arc::new(placement.load_for_inference(dir).expect("a teacher"));
        let plain = Classifier {
            weights: kdlora::encoder::TaskWeights::new(&encoder, Vec::new(), head(&encoder))
                .expect("a head"),
            task: task.task.clone(),
            encoder: Arc::clone(&encoder),
        };
        throughput("teacher sorted", &encoder, &sorted, |_| vec![&plain]);
    }
}

fn say(name: &str, value: serde_json::Value, unit: &str) {
    println!("{}", json!({"name": name, "value": value, "unit": unit}));
}

fn adapter() -> AdapterFolder {
    let adapter = format!("models/adapters/{TASK}/student");
    AdapterFolder::read(Path::new(&adapter)).expect("an adapter")
}

fn load(placement: &Placement, dir: &Path) -> (Arc<Encoder>, Classifier) {
    let encoder = Arc::new(placement.load_for_inference(dir).expect("an encoder"));
    let task = Classifier::from_adapter(Arc::clone(&encoder), &adapter()).expect("it fits");
    (encoder, task)
}

/// MPNet's head for two labels, of zeros.
fn head(encoder: &Encoder) -> std::collections::BTreeMap<String, candle_core::Tensor> {
    let hidden = encoder.config().hidden_size;
    let zeros = |shape: &[usize]| {
        candle_core::Tensor::zeros(shape, DType::F32, &candle_core::Device::Cpu).expect("memory")
    };
    [
        ("classifier.dense.weight", zeros(&[hidden, hidden])),
        ("classifier.dense.bias", zeros(&[hidden])),
        ("classifier.out_proj.weight", zeros(&[2, hidden])),
        ("classifier.out_proj.bias", zeros(&[2])),
    ]
    .into_iter()
    .map(|(name, tensor)| (name.to_owned(), tensor))
    .collect()
}

/// In this order, as many a batch as its tokens allow.
fn batches<'a>(sequences: &[&'a Sequence], tokens: usize) -> Vec<Vec<&'a Sequence>> {
    let mut all: Vec<Vec<&Sequence>> = vec![Vec::new()];
    let mut filled = 0;
    for sequence in sequences {
        if filled + sequence.ids.len() > tokens {
            all.push(Vec::new());
            filled = 0;
        }
        filled += sequence.ids.len();
        all.last_mut().expect("one").push(sequence);
    }
    all
}

/// Prints the texts per second, end to end and on the device alone. The tasks of a batch share its
/// sequences out evenly.
fn throughput<'a>(
    name: &str,
    encoder: &Encoder,
    batches: &[Vec<&Sequence>],
    tasks: impl Fn(usize) -> Vec<&'a Classifier>,
) {
    let texts: usize = batches.iter().map(Vec::len).sum();
    let pack = |batch: &Vec<&Sequence>| PackedBatch::new(batch.iter().copied());
    let launch = |batch: &PackedBatch| {
        let tasks = tasks(batch.sequences());
        let border = |task: usize| task * batch.sequences() / tasks.len();
        let segments: Vec<Segment<'_>> = tasks
            .iter()
            .enumerate()
            .map(|(i, task)| Segment {
                sequences: border(i)..border(i + 1),
                weights: &task.weights,
            })
            .collect();
        encoder.launch(batch, &segments).expect("logits")
    };
    let wait = |logits: Logits| drop(black_box(logits.wait().expect("logits")));

    // As in the server, a batch is packed while the one before it is computed.
    let end_to_end = || {
        let mut under_way: VecDeque<Logits> = VecDeque::new();
        for batch in batches {
            under_way.push_back(launch(&pack(batch)));
            if under_way.len() > 1 {
                wait(under_way.pop_front().expect("two"));
            }
        }
        under_way.into_iter().for_each(wait);
    };
    // The device has all batches to compute before the first answer is read.
    let packed: Vec<PackedBatch> = batches.iter().map(pack).collect();
    let gpu_only = || {
        let under_way: Vec<Logits> = packed.iter().map(&launch).collect();
        under_way.into_iter().for_each(wait);
    };
    for (timing, round) in [
        ("end to end", &end_to_end as &dyn Fn()),
        ("GPU only", &gpu_only),
    ] {
        round();
        let seconds = median((0..ROUNDS).map(|_| time(round)).collect());
        let value = json!(texts as f64 / seconds);
        say(&format!("{name}, {timing}"), value, "texts/s");
    }
}

fn time(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// Prints the milliseconds from the tokens of one text to its logits.
fn lone_latency(encoder: &Encoder, texts: &[Sequence], task: &Classifier) {
    let mut times = Vec::new();
    for (i, sequence) in texts.iter().cycle().take(LONE + WARM_UP).enumerate() {
        let batch = PackedBatch::new([sequence]);
        let segment = Segment {
            sequences: 0..1,
            weights: &task.weights,
        };
        let seconds = time(|| {
            drop(black_box(
                encoder.logits(&batch, &[segment]).expect("logits"),
            ))
        });
        if i >= WARM_UP {
            times.push(seconds);
        }
    }
    let value = json!(1e3 * median(times));
    say("student lone forward", value, "ms");
}

/// Holds the logits to those of the CPU in f32.
fn agreement(dir: &Path, encoder: &Encoder, task: &Classifier, texts: &[Sequence]) {
    let (plain, on_cpu) = load(&Placement::default(), dir);
    let logits = |encoder: &Encoder, task: &Classifier, texts: &[Sequence]| {
        let segment = Segment {
            sequences: 0..texts.len(),
            weights: &task.weights,
        };
        let rows = encoder.logits(&PackedBatch::new(texts), &[segment]);
        rows.expect("logits")
    };
    let (mut alike, mut most) = (0, 0f32);
    for part in texts.chunks(64) {
        let (there, here) = (logits(encoder, task, part), logits(&plain, &on_cpu, part));
        for (there, here) in there.iter().zip(&here) {
            alike += usize::from(largest(there) == largest(here));
            let apart = there.iter().zip(here).map(|(a, b)| (a - b).abs());
            most = apart.fold(most, f32::max);
        }
    }
    let share = 100.0 * alike as f64 / texts.len() as f64;
    say("labels as on the CPU in f32", json!(share), "%");
    say("greatest distance of a logit", json!(most), "");
}

fn largest(row: &[f32]) -> Option<usize> {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
