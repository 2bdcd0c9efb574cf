//! From a request to its logits: admission, tokenizer pool, queue, batcher, workers; and the table
//! of live tasks.
//!
//! ```text
//! classify ─ admission ─ tokenizer pool ─ queue ─ worker(s) ─ answer
//!            permits      own threads     fair     each a whole
//!            by sequence                  by tokens  batch at a time
//! ```
//!
//! A request that is dropped (its client has gone) or whose deadline passes leaves the queue at
//! once and is not computed.

mod fair;
#[cfg(test)]
pub(crate) mod fixture;
mod model;
mod publisher;
mod queue;
mod rate;
mod tasks;
#[cfg(test)]
mod tests;
mod tokenizing;
mod worker;

pub use model::{Model, ModelError, TaskSegment};
pub use publisher::{MergedTasks, PublishError, Publisher, Student};
pub use tasks::{LiveTask, TaskTable};
pub use tokenizing::Tokenize;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::telemetry::Metrics;
use crate::text::{Input, TokenizerError};
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
}

/// Texts to classify with one version of a task.
pub struct Request {
    pub task: Arc<LiveTask>,
    pub inputs: Vec<Input>,
    /// Cut inputs that are too long; if false they are an error.
    pub truncate: bool,
    /// The answer is worth nothing after this.
    pub deadline: Instant,
}

/// Rows of logits of a request.
#[derive(Debug)]
pub struct Answer {
    /// `[inputs][labels]`
    pub logits: Vec<Vec<f32>>,
    /// Tokens of all inputs, special tokens included.
    pub tokens: usize,
    pub timings: Timings,
}

/// Where the time of a request went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
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
    admission: Arc<Semaphore>,
    tokenizers: TokenizerPool,
    queue: Arc<Queue>,
    rate: Arc<ServiceRate>,
    max_queue: usize,
}

impl Serving {
    /// Starts the threads.
    pub fn start(
        model: Arc<dyn Model>,
        tokenizer: Arc<dyn Tokenize>,
        options: Options,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue::new(options.max_batch_tokens, Arc::clone(&metrics)));
        let serving = Self {
            admission: Arc::new(Semaphore::new(options.max_queue)),
            tokenizers: TokenizerPool::start(tokenizer, options.tokenizer_threads)?,
            queue: Arc::clone(&queue),
            rate: Arc::new(ServiceRate::new(options.workers)),
            max_queue: options.max_queue,
        };
        for i in 0..options.workers {
            let (model, queue) = (Arc::clone(&model), Arc::clone(&queue));
            let (metrics, rate) = (Arc::clone(&metrics), Arc::clone(&serving.rate));
            thread::Builder::new()
                .name(format!("worker-{i}"))
                .spawn(move || worker::work(&*model, &queue, &metrics, &rate))?;
        }
        Ok(serving)
    }

    /// Classifies the inputs. Dropping the future takes the request out of the queue.
    pub async fn classify(&self, request: Request) -> Result<Answer, ServingError> {
        let permit = self.admit(request.inputs.len())?;
        timeout_at(request.deadline, self.answer(request, permit))
            .await
            .unwrap_or(Err(ServingError::Deadline))
    }

    /// Permits for all sequences of a request or none, without waiting: a client that is told at
    /// once can go elsewhere.
    fn admit(&self, sequences: usize) -> Result<OwnedSemaphorePermit, ServingError> {
        let permits = u32::try_from(sequences).ok();
        let admission = Arc::clone(&self.admission);
        let permit = permits.and_then(|permits| admission.try_acquire_many_owned(permits).ok());
        permit.ok_or_else(|| {
            let inside = self.max_queue - self.admission.available_permits().min(self.max_queue);
            ServingError::Full {
                retry_after: self.rate.wait(inside),
            }
        })
    }

    async fn answer(
        &self,
        request: Request,
        permit: OwnedSemaphorePermit,
    ) -> Result<Answer, ServingError> {
        let Request {
            task,
            inputs,
            truncate,
            ..
        } = request;
        let arrived = Instant::now();
        let truncation = truncate.then_some(task.config.truncation);
        let sequences = self
            .tokenizers
            .encode(inputs, task.max_length, truncation)
            .await?;
        let tokenize = arrived.elapsed();
        let tokens = sequences.iter().map(|sequence| sequence.ids.len()).sum();

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
        let _leave = LeaveQueue {
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
            tokenize,
            queue,
            compute,
        };
        Ok(Answer {
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
