//! Tokenising on threads of its own: it takes milliseconds for a long text, too long for the
//! threads that serve connections.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use super::ServingError;
use crate::text::{Input, Sequence, Tokenizer, TokenizerError, Truncation};

/// Turns inputs into sequences; called by several threads at once.
pub trait Tokenize: Send + Sync + 'static {
    /// At most `max_length` tokens, special tokens included; a longer input is cut by `truncation`
    /// and an error without.
    fn encode(
        &self,
        input: &Input,
        max_length: usize,
        truncation: Option<Truncation>,
    ) -> Result<Sequence, TokenizerError>;
}

impl Tokenize for Tokenizer {
    fn encode(
        &self,
        input: &Input,
        max_length: usize,
        truncation: Option<Truncation>,
    ) -> Result<Sequence, TokenizerError> {
        self.encode(input, max_length, truncation)
    }
}

/// The inputs of one request.
struct Job {
    inputs: Vec<Input>,
    max_length: usize,
    truncation: Option<Truncation>,
    reply: oneshot::Sender<Result<Vec<Sequence>, ServingError>>,
}

/// Threads that tokenise. Their queue has no limit of its own: admission bounds it. They end when
/// the pool is dropped.
pub(super) struct TokenizerPool {
    jobs: Sender<Job>,
}

impl TokenizerPool {
    pub(super) fn start(tokenizer: Arc<dyn Tokenize>, threads: usize) -> io::Result<Self> {
        let (jobs, receiver) = mpsc::channel();
        let receiver = Arc::new(Mutex::new(receiver));
        for i in 0..threads {
            let (tokenizer, receiver) = (Arc::clone(&tokenizer), Arc::clone(&receiver));
            thread::Builder::new()
                .name(format!("tokenize-{i}"))
                .spawn(move || work(&*tokenizer, &receiver))?;
        }
        Ok(Self { jobs })
    }

    /// The sequences of `inputs`, in order.
    pub(super) async fn encode(
        &self,
        inputs: Vec<Input>,
        max_length: usize,
        truncation: Option<Truncation>,
    ) -> Result<Vec<Sequence>, ServingError> {
        let (reply, sequences) = oneshot::channel();
        let job = Job {
            inputs,
            max_length,
            truncation,
            reply,
        };
        self.jobs.send(job).map_err(|_| ServingError::Failed)?;
        sequences.await.map_err(|_| ServingError::Failed)?
    }
}

fn work(tokenizer: &dyn Tokenize, jobs: &Mutex<Receiver<Job>>) {
    loop {
        // The lock is held while waiting: whoever has it takes the next job.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        if job.reply.is_closed() {
            continue;
        }
        let sequences = catch_unwind(AssertUnwindSafe(|| encode_all(tokenizer, &job)))
            .unwrap_or_else(|_| {
                tracing::error!("the tokenizer panicked");
                Err(ServingError::Failed)
            });
        // Nobody is there to read it if the client has gone meanwhile.
        let _ = job.reply.send(sequences);
    }
}

fn encode_all(tokenizer: &dyn Tokenize, job: &Job) -> Result<Vec<Sequence>, ServingError> {
    job.inputs
        .iter()
        .enumerate()
        .map(|(index, input)| {
            tokenizer
                .encode(input, job.max_length, job.truncation)
                .map_err(|error| ServingError::Tokenize { index, error })
        })
        .collect()
}
