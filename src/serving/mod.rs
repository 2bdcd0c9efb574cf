//! From a request to its logits: admission, tokenizer pool, queue, batcher, workers; and the table
//! of live tasks.
//!
//! ```text
//! classify ─ admission ─ adapter ─ tokenizer pool ─ queue ─ worker(s) ─ answer
//!            permits     read if   own threads     fair     each a whole
//!            by task     not there                 by tokens  batch at a time
//! ```
//!
//! A request that is dropped (its client has gone) or whose deadline passes leaves the queue at
//! once and is not computed.

mod admission;
mod budget;
mod fair;
#[cfg(test)]
pub(crate) mod fixture;
mod loader;
mod model;
mod publisher;
mod queue;
mod rate;
mod residents;
mod tasks;
#[cfg(test)]
mod tests;
mod tokenizing;
mod worker;

pub use budget::Reservation;
pub use loader::{Loader, Student};
pub use model::{Model, ModelError, SharedCores, TaskSegment};
pub use publisher::{PublishError, Publisher, TaskSet, Wishes};
pub use residents::{Load, LoadError, Residents};
pub use tasks::{Entry, LiveTask, TaskTable};
pub use tokenizing::Tokenize;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::telemetry::Metrics;
use crate::text::{Input, TokenizerError, TruncationDirection};
use admission::{Admission, Bounds, Permit};
use queue::{Computed, Item, Pending, Queue};
use rate::ServiceRate;
use tokenizing::TokenizerPool;

/// How the engine is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that compute, each a whole batch of its own.
    pub workers: usize,
    pub tokenizer_threads: usize,
    /// Most tokens in one batch.
    pub max_batch_tokens: usize,
    /// Most sequences in the engine at a time.
    pub max_queue: usize,
    /// Longest wait that the work in the engine may mean for a request that comes.
    pub max_wait: Duration,
    /// Most tokens in one sequence.
    pub max_length: usize,
}

/// Texts to classify with one version of a task.
pub struct Request {
    pub task: Arc<Entry>,
    pub inputs: Vec<Input>,
    /// Cut inputs that are too long; if false they are an error.
    pub truncate: bool,
    /// Which side of them is cut; by default that of the tokenizer.
    pub truncation_direction: Option<TruncationDirection>,
    /// The answer is worth nothing after this.
    pub deadline: Instant,
}

/// Rows of logits of a request.
#[derive(Debug)]
pub struct Answer {
    /// Who has answered.
    pub task: Arc<LiveTask>,
    /// `[inputs][labels]`
    pub logits: Vec<Vec<f32>>,
    /// Tokens of all inputs, special tokens included.
    pub tokens: usize,
    pub timings: Timings,
}

/// Where the time of a request went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Zero where the version was in memory.
    pub load: Duration,
    /// Includes the wait for a tokenizer thread.
    pub tokenize: Duration,
    /// From entering the queue to the start of the first batch.
    pub queue: Duration,
    /// From there to the end of the last batch.
    pub compute: Duration,
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    #[error("the queue is full")]
    Full {
        /// What the work in the engine takes, as fast as it is done at present.
        retry_after: Duration,
    },
    #[error("the version can't be loaded")]
    Load(#[source] Arc<LoadError>),
    #[error("input {index} can't be tokenised")]
    Tokenize {
        /// Place of the input in the request.
        index: usize,
        #[source]
        error: TokenizerError,
    },
    #[error("the deadline has passed")]
    Deadline,
    /// The log has the reason.
    #[error("the model failed")]
    Failed,
}

/// The engine. Its threads end when it is dropped and what is queued is done.
pub struct Serving {
    residents: Arc<Residents>,
    admission: Arc<Admission>,
    tokenizers: TokenizerPool,
    queue: Arc<Queue>,
    max_length: usize,
}

impl Serving {
    /// Starts the threads.
    pub fn start(
        model: Arc<dyn Model>,
        tokenizer: Arc<dyn Tokenize>,
        residents: Arc<Residents>,
        options: Options,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue::new(options.max_batch_tokens, Arc::clone(&metrics)));
        let rate = Arc::new(ServiceRate::new(options.workers));
        let bounds = Bounds {
            sequences: options.max_queue,
            wait: options.max_wait,
        };
        let serving = Self {
            residents,
            admission: Admission::new(bounds, Arc::clone(&rate)),
            tokenizers: TokenizerPool::start(tokenizer, options.tokenizer_threads)?,
            queue: Arc::clone(&queue),
            max_length: options.max_length,
        };
        for i in 0..options.workers {
            let (model, queue) = (Arc::clone(&model), Arc::clone(&queue));
            let (metrics, rate) = (Arc::clone(&metrics), Arc::clone(&rate));
            thread::Builder::new()
                .name(format!("worker-{i}"))
                .spawn(move || worker::work(&*model, &queue, &metrics, &rate))?;
        }
        Ok(serving)
    }

    /// Most tokens that a sequence of any task is cut to.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Classifies the inputs. Dropping the future takes the request out of the queue.
    pub async fn classify(&self, request: Request) -> Result<Answer, ServingError> {
        if request.deadline <= Instant::now() {
            return Err(ServingError::Deadline);
        }
        let inputs = &request.inputs;
        let tokens = inputs.iter().map(|input| self.estimate(input)).sum();
        let permit = self
            .admission
            .enter(&request.task.name, inputs.len(), tokens)
            .map_err(|retry_after| ServingError::Full { retry_after })?;
        timeout_at(request.deadline, self.answer(request, permit))
            .await
            .unwrap_or(Err(ServingError::Deadline))
    }

    /// About how many tokens a text has.
    fn estimate(&self, input: &Input) -> usize {
        const BYTES_PER_TOKEN: usize = 5;
        let pair = input.text_pair.as_ref().map_or(0, String::len);
        let tokens = (input.text.len() + pair).div_ceil(BYTES_PER_TOKEN) + 2;
        tokens.min(self.max_length)
    }

    async fn answer(&self, request: Request, mut permit: Permit) -> Result<Answer, ServingError> {
        let Request {
            task,
            inputs,
            truncate,
            truncation_direction,
            ..
        } = request;
        let arrived = Instant::now();
        let was_resident = task.is_resident();
        let task = self
            .residents
            .acquire(&task)
            .await
            .map_err(ServingError::Load)?;
        let load = match was_resident {
            true => Duration::ZERO,
            false => arrived.elapsed(),
        };

        let arrived = Instant::now();
        let truncation = truncate.then_some(task.config.truncation);
        let sequences = self
            .tokenizers
            .encode(inputs, task.max_length, truncation, truncation_direction)
            .await?;
        let tokenize = arrived.elapsed();
        let tokens = sequences.iter().map(|sequence| sequence.ids.len()).sum();
        permit.settle(tokens);

        let (pending, answer) = Pending::new(sequences.len(), permit);
        let items = sequences
            .into_iter()
            .enumerate()
            .map(|(index, sequence)| Item {
                pending: Arc::clone(&pending),
                index,
                task: Arc::clone(&task),
                sequence,
            })
            .collect();
        self.queue.push(items);
        let leave = LeaveQueue {
            queue: &self.queue,
            task: &task.name,
            pending: &pending,
        };
        let Computed {
            logits,
            queue,
            compute,
        } = answer.await.map_err(|_| ServingError::Failed)??;
        let timings = Timings {
            load,
            tokenize,
            queue,
            compute,
        };
        drop(leave);
        Ok(Answer {
            task,
            logits,
            tokens,
            timings,
        })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// Takes what is left of a request out of the queue when nobody waits for it any more: answered,
/// failed, past its deadline, or its client gone.
struct LeaveQueue<'a> {
    queue: &'a Queue,
    task: &'a str,
    pending: &'a Arc<Pending>,
}

impl Drop for LeaveQueue<'_> {
    fn drop(&mut self) {
        self.queue.discard(self.task, self.pending);
    }
}
