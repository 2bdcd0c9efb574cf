//! Logits of many sequences, over all cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::encoder::{Encoder, EncoderError, Segment, TaskWeights};
use crate::text::{PackedBatch, Sequence};

/// Tokens of a batch: enough for the matrix products to run at full speed, and few enough for the
/// cores to end at about the same time.
const BATCH_TOKENS: usize = 1024;

/// One row of logits a sequence, in order. `done` hears of sequences and tokens as they are
/// finished.
pub fn predict(
    encoder: &Encoder,
    weights: &TaskWeights,
    sequences: &[&Sequence],
    threads: usize,
    done: &(dyn Fn(usize, usize) + Sync),
) -> Result<Vec<Vec<f32>>, EncoderError> {
    let batches = cut(sequences);
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(vec![Vec::new(); sequences.len()]);
    let work = || {
        while let Some(range) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
            let batch = PackedBatch::new(sequences[range.clone()].iter().copied());
            let segment = Segment {
                sequences: 0..batch.sequences(),
                weights,
            };
            let logits = encoder.logits(&batch, &[segment])?;
            done(batch.sequences(), batch.tokens());
            let mut rows = rows.lock().unwrap_or_else(|poison| poison.into_inner());
            for (row, logits) in rows[range.clone()].iter_mut().zip(logits) {
                *row = logits;
            }
        }
        Ok::<_, EncoderError>(())
    };
    in_parallel(threads, |_| work())?;
    Ok(rows
        .into_inner()
        .unwrap_or_else(|poison| poison.into_inner()))
}

/// Ranges of consecutive sequences of about [`BATCH_TOKENS`].
fn cut(sequences: &[&Sequence]) -> Vec<std::ops::Range<usize>> {
    let mut batches = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (i, sequence) in sequences.iter().enumerate() {
        if i > start && tokens + sequence.ids.len() > BATCH_TOKENS {
            batches.push(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += sequence.ids.len();
    }
    if start < sequences.len() {
        batches.push(start..sequences.len());
    }
    batches
}

/// Runs `work(0)` … `work(threads - 1)` at the same time; the first error wins.
pub(super) fn in_parallel<R: Send, E: Send>(
    threads: usize,
    work: impl Fn(usize) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    if threads <= 1 {
        return Ok(vec![work(0)?]);
    }
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .map(|thread| {
                let work = &work;
                scope.spawn(move || work(thread))
            })
            .collect();
        let mut results = vec![work(0)];
        for other in others {
            results.push(match other.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
        }
        results.into_iter().collect()
    })
}

/// Cuts `lengths` into at most `parts` ranges of about equal sums, none of them empty.
pub fn share_out(lengths: &[usize], parts: usize) -> Vec<std::ops::Range<usize>> {
    let total: usize = lengths.iter().sum();
    let mut shares = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for (i, length) in lengths.iter().enumerate() {
        sum += length;
        let target = total * (shares.len() + 1) / parts.max(1);
        if sum >= target && i + 1 > start {
            shares.push(start..i + 1);
            start = i + 1;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_in_order_and_are_balanced() {
        let shares = share_out(&[5, 1, 1, 1, 5, 1, 1, 5], 2);
        assert_eq!(shares, [0..5, 5..8]);
        assert_eq!(share_out(&[3], 4).len(), 1);
        assert!(share_out(&[], 2).is_empty());
        let many = share_out(&[1; 10], 3);
        assert_eq!(many.last().unwrap().end, 10);
        assert_eq!(many.len(), 3);
    }

    #[test]
    fn batches_keep_to_the_token_budget() {
        let sequence = |tokens: usize| Sequence {
            ids: vec![1; tokens],
            type_ids: vec![0; tokens],
            truncated: false,
        };
        let sequences = [sequence(600), sequence(600), sequence(400), sequence(2000)];
        let references: Vec<&Sequence> = sequences.iter().collect();
        assert_eq!(cut(&references), [0..1, 1..3, 3..4]);
    }

    #[test]
    fn an_error_of_any_thread_is_the_answer() {
        let result = in_parallel(3, |i| if i == 2 { Err("two") } else { Ok(i) });
        assert_eq!(result, Err("two"));
        assert_eq!(in_parallel(3, Ok::<_, ()>), Ok(vec![0, 1, 2]));
    }
}
