//! Tokenising on threads of its own: it takes milliseconds for a long text, too long for the
//! threads that serve connections. A few sentences take less than to wake a thread and be woken by
//! it: they are tokenised where they are.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use super::ServingError;
use crate::text::{Input, Sequence, Tokenizer, TokenizerError, Truncation, TruncationDirection};

/// Bytes of a request that are tokenised on the thread of its connection: a tenth of a millisecond.
const SHORT: usize = 512;
/// What an input takes beside its bytes, in bytes: many empty ones are no short request.
const EACH: usize = 16;

/// Turns inputs into sequences; called by several threads at once.
pub trait Tokenize: Send + Sync + 'static {
    /// At most `max_length` tokens, special tokens included; a longer input is cut by `truncation`
    /// on the side that
    /// `direction` names, and an error without.
    fn encode(
        &self,
        input: &Input,
        max_length: usize,
        truncation: Option<Truncation>,
        direction: Option<TruncationDirection>,
    ) -> Result<Sequence, TokenizerError>;
}

impl Tokenize for Tokenizer {
    fn encode(
        &self,
        input: &Input,
        max_length: usize,
        truncation: Option<Truncation>,
        direction: Option<TruncationDirection>,
    ) -> Result<Sequence, TokenizerError> {
        self.encode_from(input, max_length, truncation, direction)
    }
}

/// The inputs of one request.
struct Texts {
    inputs: Vec<Input>,
    max_length: usize,
    truncation: Option<Truncation>,
    direction: Option<TruncationDirection>,
}

struct Job {
    texts: Texts,
    reply: oneshot::Sender<Result<Vec<Sequence>, ServingError>>,
}

/// Threads that tokenise. Their queue has no limit of its own: admission bounds it. They end when
/// the pool is dropped.
pub(super) struct TokenizerPool {
    tokenizer: Arc<dyn Tokenize>,
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
        Ok(Self { tokenizer, jobs })
    }

    /// The sequences of `inputs`, in order.
    pub(super) async fn encode(
        &self,
        inputs: Vec<Input>,
        max_length: usize,
        truncation: Option<Truncation>,
        direction: Option<TruncationDirection>,
    ) -> Result<Vec<Sequence>, ServingError> {
        let texts = Texts {
            inputs,
            max_length,
            truncation,
            direction,
        };
        if texts.is_short() {
            return texts.encode(&*self.tokenizer);
        }
        let (reply, sequences) = oneshot::channel();
        self.jobs
            .send(Job { texts, reply })
            .map_err(|_| ServingError::Failed)?;
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
        // Nobody is there to read it if the client has gone meanwhile.
        let _ = job.reply.send(job.texts.encode(tokenizer));
    }
}

impl Texts {
    fn is_short(&self) -> bool {
        let bytes = |input: &Input| {
            let pair = input.text_pair.as_ref().map_or(0, String::len);
            EACH + input.text.len() + pair
        };
        self.inputs.iter().map(bytes).sum::<usize>() <= SHORT
    }

    fn encode(&self, tokenizer: &dyn Tokenize) -> Result<Vec<Sequence>, ServingError> {
        catch_unwind(AssertUnwindSafe(|| self.encode_each(tokenizer))).unwrap_or_else(|_| {
            tracing::error!("the tokenizer panicked");
            Err(ServingError::Failed)
        })
    }

    fn encode_each(&self, tokenizer: &dyn Tokenize) -> Result<Vec<Sequence>, ServingError> {
        self.inputs
            .iter()
            .enumerate()
            .map(|(index, input)| {
                tokenizer
                    .encode(input, self.max_length, self.truncation, self.direction)
                    .map_err(|error| ServingError::Tokenize { index, error })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_a_long_text_nor_many_empty_ones_are_short() {
        let is_short = |text: &str, count| {
            let input = Input {
                text: text.to_owned(),
                text_pair: None,
            };
            let texts = Texts {
                inputs: vec![input; count],
                max_length: 128,
                truncation: None,
                direction: None,
            };
            texts.is_short()
        };
        assert!(is_short("A quiet, wonderful film.", 4));
        assert!(!is_short(&"long ".repeat(200), 1));
        assert!(!is_short("", 256));
    }
}
