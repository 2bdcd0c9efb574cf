//! Between requests and workers: sequences wait here until a worker is free.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::admission::Permit;
use super::fair::FairQueue;
use super::{LiveTask, ServingError};
use crate::telemetry::Metrics;
use crate::text::Sequence;

/// Fewer tokens than this are not worth a batch of their own: matrix products reach their full
/// speed from about here on a CPU core.
const MIN_SHARE_TOKENS: usize = 64;

/// A request in the queue. Its rows come in from one batch or several.
pub(super) struct Pending {
    state: Mutex<State>,
}

struct State {
    /// Rows of logits by sequence.
    rows: Vec<Option<Vec<f32>>>,
    missing: usize,
    queued_at: Instant,
    /// When the first of its batches began.
    started_at: Option<Instant>,
    /// Held until the answer is there; without one, until the last sequence has left the queue and
    /// the workers.
    permit: Option<Permit>,
    /// Taken with the answer.
    reply: Option<oneshot::Sender<Result<Computed, ServingError>>>,
}

/// The rows of a request.
#[derive(Debug)]
pub(super) struct Computed {
    pub(super) logits: Vec<Vec<f32>>,
    /// From entering the queue to the start of the first batch.
    pub(super) queue: Duration,
    /// From there to the end of the last batch.
    pub(super) compute: Duration,
}

impl Pending {
    pub(super) fn new(
        sequences: usize,
        permit: Permit,
    ) -> (Arc<Self>, oneshot::Receiver<Result<Computed, ServingError>>) {
        let (reply, answer) = oneshot::channel();
        let state = State {
            rows: vec![None; sequences],
            missing: sequences,
            queued_at: Instant::now(),
            started_at: None,
            permit: Some(permit),
            reply: Some(reply),
        };
        let state = Mutex::new(state);
        (Arc::new(Self { state }), answer)
    }

    /// Whether somebody waits for the answer. Marks the request as started if so.
    pub(super) fn begin(&self) -> bool {
        let mut state = self.lock();
        let waiting = state.reply.as_ref().is_some_and(|reply| !reply.is_closed());
        if waiting && state.started_at.is_none() {
            state.started_at = Some(Instant::now());
        }
        waiting
    }

    pub(super) fn fulfil(&self, index: usize, row: Vec<f32>) {
        let mut state = self.lock();
        if let Some(place @ None) = state.rows.get_mut(index) {
            *place = Some(row);
            state.missing -= 1;
        }
        if state.missing > 0 {
            return;
        }
        let started_at = state.started_at.unwrap_or(state.queued_at);
        let computed = Computed {
            logits: state.rows.iter_mut().filter_map(Option::take).collect(),
            queue: started_at.duration_since(state.queued_at),
            compute: started_at.elapsed(),
        };
        // Before the answer: who has it may send the next request.
        state.permit = None;
        if let Some(reply) = state.reply.take() {
            // The client may have gone meanwhile.
            let _ = reply.send(Ok(computed));
        }
    }

    pub(super) fn fail(&self, error: ServingError) {
        if let Some(reply) = self.lock().reply.take() {
            let _ = reply.send(Err(error));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One sequence of a request.
pub(super) struct Item {
    pub(super) pending: Arc<Pending>,
    /// Its place in the request.
    pub(super) index: usize,
    /// The version that the request started with.
    pub(super) task: Arc<LiveTask>,
    pub(super) sequence: Sequence,
}

/// One queue over all tasks.
pub(super) struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
    max_batch_tokens: usize,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct QueueState {
    items: FairQueue<Item>,
    /// Workers that wait for a batch.
    idle: usize,
    closed: bool,
}

impl Queue {
    pub(super) fn new(max_batch_tokens: usize, metrics: Arc<Metrics>) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            max_batch_tokens,
            metrics,
        }
    }

    /// Adds the sequences of a request.
    pub(super) fn push(&self, items: Vec<Item>) {
        let mut state = self.lock();
        // No more than can have a batch: a worker that wakes for nothing takes a core from one that
        // computes.
        let woken = items.len().min(state.idle);
        for item in items {
            let cost = item.sequence.ids.len();
            let lane = Arc::clone(&item.task);
            state.items.push(&lane.name, cost, item);
        }
        self.metrics.queue_depth(state.items.len());
        drop(state);
        for _ in 0..woken {
            self.changed.notify_one();
        }
    }

    /// Waits until there is work, and takes a batch of it; `None` once the queue is closed and
    /// empty.
    ///
    /// A batch is formed at the moment a worker is free for it, so that under load it has grown
    /// meanwhile and without load nothing waits. When several workers are free they share what is
    /// there: a core is better used by half a batch than by none.
    pub(super) fn take(&self) -> Option<Vec<Item>> {
        let mut state = self.lock();
        state.idle += 1;
        while state.items.len() == 0 && !state.closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let share = state.items.cost().div_ceil(state.idle);
        let budget = share.max(MIN_SHARE_TOKENS).min(self.max_batch_tokens);
        state.idle -= 1;
        let batch = state.items.take(budget);
        self.metrics.queue_depth(state.items.len());
        (!batch.is_empty()).then_some(batch)
    }

    /// Takes the sequences of a request out that nobody waits for any more.
    pub(super) fn discard(&self, task: &str, pending: &Arc<Pending>) {
        let mut state = self.lock();
        let gone = state
            .items
            .discard(task, |item| Arc::ptr_eq(&item.pending, pending));
        if gone > 0 {
            self.metrics.queue_depth(state.items.len());
        }
    }

    /// Sequences that wait.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lock().items.len()
    }

    /// Workers that wait.
    #[cfg(test)]
    pub(super) fn idle(&self) -> usize {
        self.lock().idle
    }

    /// Workers end when what is queued is done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
