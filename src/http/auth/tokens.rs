//! Files of tokens. A token is a line, and only its SHA-256 is kept:
//!
//! ```text
//! # comment
//! TOKEN
//! name:TOKEN
//! name:sha256:HEX rate=50/s max-body=65536 max-upload=1048576
//! ```
//!
//! The file is read again when it has changed: a token is added, replaced or withdrawn without a
//! restart.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::rate::Rate;
use crate::blocking;
use crate::telemetry::chain;

/// How long a file is taken to be unchanged.
const RECHECK: Duration = Duration::from_millis(500);

/// Shorter tokens can be guessed.
const SHORT: usize = 16;

/// Tokens that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    #[error("can't read the token file {path:?}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The line itself is not shown: it may hold a token.
    #[error("line {line} of the tokens: {reason}")]
    Line { line: usize, reason: String },
    #[error("there is no token in {0}")]
    Empty(String),
}

/// One who may use the API.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) name: String,
    digest: [u8; 32],
    pub(super) limits: TokenLimits,
}

/// What a token may do less than others.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct TokenLimits {
    pub(super) rate: Option<Rate>,
    /// Bytes of a request.
    pub(super) max_body: Option<usize>,
    /// Bytes of a request to an admin route.
    pub(super) max_upload: Option<usize>,
}

/// Where tokens come from, and what was there last.
pub struct Tokens {
    file: Option<PathBuf>,
    loaded: ArcSwap<Loaded>,
    started: Instant,
    /// Milliseconds from `started` to the last look at the file.
    checked: AtomicU64,
}

struct Loaded {
    tokens: Vec<Arc<Token>>,
    stamp: Option<Stamp>,
}

/// Tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    size: u64,
    inode: u64,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.loaded.load();
        let names: Vec<_> = names.tokens.iter().map(|token| &token.name).collect();
        f.debug_struct("Tokens")
            .field("file", &self.file)
            .field("names", &names)
            .finish()
    }
}

impl Tokens {
    /// The tokens of a file, which is watched from then on.
    pub fn file(path: &Path) -> Result<Self, TokensError> {
        let loaded = read(path)?;
        if loaded.tokens.is_empty() {
            return Err(TokensError::Empty(format!("{path:?}")));
        }
        Ok(Self::with(Some(path.to_owned()), loaded))
    }

    /// Tokens that stay as they are, each on a line. `source` is where they come from, for errors.
    pub fn fixed(text: &str, source: &str) -> Result<Self, TokensError> {
        let tokens = parse(text)?;
        if tokens.is_empty() {
            return Err(TokensError::Empty(source.to_owned()));
        }
        let loaded = Loaded {
            tokens,
            stamp: None,
        };
        Ok(Self::with(None, loaded))
    }

    fn with(file: Option<PathBuf>, loaded: Loaded) -> Self {
        Self {
            file,
            loaded: ArcSwap::from_pointee(loaded),
            started: Instant::now(),
            checked: AtomicU64::new(0),
        }
    }

    /// The token that was presented, if it is one of these. It is compared with all of them, each
    /// in the same time whatever the two have in common.
    pub(super) fn find(&self, presented: &[u8]) -> Option<Arc<Token>> {
        self.refresh();
        let digest: [u8; 32] = Sha256::digest(presented).into();
        let mut found = None;
        for token in &self.loaded.load().tokens {
            if bool::from(token.digest.ct_eq(&digest)) {
                found = Some(Arc::clone(token));
            }
        }
        found
    }

    /// Reads the file again if it has changed since the last look, which is not done more often
    /// than every [`RECHECK`].
    fn refresh(&self) {
        let Some(path) = &self.file else { return };
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let recheck = u64::try_from(RECHECK.as_millis()).unwrap_or(u64::MAX);
        let due = self
            .checked
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |checked| {
                (now >= checked.saturating_add(recheck)).then_some(now)
            });
        if due.is_err() {
            return;
        }
        blocking::in_place(|| self.read_again(path));
    }

    fn read_again(&self, path: &Path) {
        let before = self.loaded.load();
        if stamp(path).ok() == before.stamp && before.stamp.is_some() {
            return;
        }
        match read(path) {
            // Nobody gets in with an empty file: that is how all tokens are withdrawn at once.
            Ok(loaded) => {
                tracing::info!(file = %path.display(), tokens = loaded.tokens.len(), "tokens read again");
                self.loaded.store(Arc::new(loaded));
            }
            Err(error) => tracing::error!(error = chain(&error), "the tokens stay as they were"),
        }
    }
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let file = fs::metadata(path)?;
    Ok(Stamp {
        modified: (file.mtime(), file.mtime_nsec()),
        size: file.size(),
        inode: file.ino(),
    })
}

fn read(path: &Path) -> Result<Loaded, TokensError> {
    let unreadable = |source| TokensError::Read {
        path: path.to_owned(),
        source,
    };
    // The stamp is the older of the two: a change between them is seen the next time.
    let stamp = stamp(path).map_err(unreadable)?;
    let text = fs::read_to_string(path).map_err(unreadable)?;
    Ok(Loaded {
        tokens: parse(&text)?,
        stamp: Some(stamp),
    })
}

fn parse(text: &str) -> Result<Vec<Arc<Token>>, TokensError> {
    let mut tokens: Vec<Arc<Token>> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let token = parse_line(line, index + 1).map_err(|reason| TokensError::Line {
            line: index + 1,
            reason,
        })?;
        if tokens.iter().any(|other| other.name == token.name) {
            return Err(TokensError::Line {
                line: index + 1,
                reason: format!("there is another token named {:?}", token.name),
            });
        }
        tokens.push(Arc::new(token));
    }
    Ok(tokens)
}

fn parse_line(line: &str, number: usize) -> Result<Token, String> {
    let mut words = line.split_whitespace();
    let word = words.next().unwrap_or_default();
    let (name, secret) = match word.split_once(':') {
        Some(("sha256", _)) | None => (format!("line-{number}"), word),
        Some((name, secret)) => (checked_name(name)?, secret),
    };
    let digest = match secret.strip_prefix("sha256:") {
        Some(hex) => parse_hex(hex).ok_or("a SHA-256 has 64 hexadecimal digits")?,
        None if secret.is_empty() => return Err("the token is empty".to_owned()),
        None => {
            if secret.len() < SHORT {
                tracing::warn!(
                    name,
                    "a token of fewer than {SHORT} characters can be guessed"
                );
            }
            Sha256::digest(secret).into()
        }
    };
    let mut limits = TokenLimits::default();
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            return Err("after the token come limits, as rate=50/s".to_owned());
        };
        let bytes = || {
            let bytes = value.parse::<usize>().map(Some);
            bytes.map_err(|_| format!("{key} is a number of bytes"))
        };
        match key {
            "rate" => limits.rate = Some(value.parse::<Rate>().map_err(|error| error.to_string())?),
            "max-body" => limits.max_body = bytes()?,
            "max-upload" => limits.max_upload = bytes()?,
            _ => return Err("the limits are rate, max-body and max-upload".to_owned()),
        }
    }
    Ok(Token {
        name,
        digest,
        limits,
    })
}

/// Names stand in logs and in the history of versions.
fn checked_name(name: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        return Err("a name has up to 64 letters, digits, dots, dashes and underscores".to_owned());
    }
    Ok(name.to_owned())
}

fn parse_hex(hex: &str) -> Option<[u8; 32]> {
    if hex.len() != 64 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, place) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&hex[place..place + 2], 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf s3cret-s3cret-s3cret | sha256sum`
    fn hashed(secret: &str) -> String {
        let digest = Sha256::digest(secret);
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn a_line_is_a_token_with_or_without_name_hash_and_limits() {
        let text = format!(
            "# who\n\nplain-token-of-length\nana:her-own-token-0123\nbot:sha256:{} rate=5/s \
             max-body=100 max-upload=200\nsha256:{}\n",
            hashed("bots"),
            hashed("unnamed").to_uppercase()
        );
        let tokens = Tokens::fixed(&text, "a test").expect("tokens");
        let name = |secret: &str| {
            tokens
                .find(secret.as_bytes())
                .map(|token| token.name.clone())
        };
        assert_eq!(name("plain-token-of-length").as_deref(), Some("line-3"));
        assert_eq!(name("her-own-token-0123").as_deref(), Some("ana"));
        assert_eq!(name("bots").as_deref(), Some("bot"));
        assert_eq!(name("unnamed").as_deref(), Some("line-6"));
        assert_eq!(name("ana:her-own-token-0123"), None);
        assert_eq!(name(&hashed("bots")), None);
        assert_eq!(name(""), None);
        let bot = tokens.find(b"bots").expect("the bot");
        assert_eq!(
            bot.limits,
            TokenLimits {
                rate: "5/s".parse().ok(),
                max_body: Some(100),
                max_upload: Some(200)
            }
        );
        assert!(!format!("{tokens:?}").contains("her-own"));
    }

    #[test]
    fn what_cannot_be_read_is_told_without_the_token() {
        for (text, sentence) in [
            (
                "a:secret\na:other",
                "line 2 of the tokens: there is another token named \"a\"",
            ),
            ("a:sha256:12", "64 hexadecimal"),
            ("a:", "is empty"),
            ("a b:secret", "after the token"),
            ("ä:secret", "a name has"),
            ("a:secret rate=5", "is not a rate"),
            ("a:secret max-body=x", "a number of bytes"),
            ("a:secret speed=5", "the limits are"),
            ("# nobody", "no token in a test"),
        ] {
            let error = Tokens::fixed(text, "a test").expect_err(text).to_string();
            assert!(error.contains(sentence), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_broken_one_is_not_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokens");
        let replace = |text: &str| {
            // As an administrator should: whole files only.
            let other = folder.path().join("other");
            fs::write(&other, text).expect("write");
            fs::rename(&other, &path).expect("rename");
        };
        replace("ana:first-token-0123456");
        let tokens = Tokens::file(&path).expect("tokens");
        let look = |secret: &str| {
            tokens.checked.store(0, Ordering::Release);
            let started = tokens.started;
            while started.elapsed() < RECHECK {
                std::thread::yield_now();
            }
            tokens.find(secret.as_bytes()).is_some()
        };
        assert!(look("first-token-0123456"));
        replace("ana:second-token-012345");
        assert!(look("second-token-012345") && !look("first-token-0123456"));
        replace("ana:");
        assert!(look("second-token-012345"));
        fs::remove_file(&path).expect("remove");
        assert!(look("second-token-012345"));
        replace("");
        assert!(!look("second-token-012345"));
        replace("ana:third-token-0123456");
        assert!(look("third-token-0123456"));
    }
}
