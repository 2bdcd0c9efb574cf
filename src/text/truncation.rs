//! Which text gives way where an input is too long.

use serde::{Deserialize, Serialize};
use tokenizers::Encoding;
use tokenizers::utils::truncation::TruncationDirection;
use utoipa::ToSchema;

/// The strategies of `transformers` that are of use to classifiers, under its names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// Of a pair the longer text is cut first, both to about half where both are longer.
    #[default]
    LongestFirst,
    /// The first text, say a question, is never cut.
    OnlySecond,
}

/// The beginning of a text in tokens, or all of it.
pub(super) struct Head {
    /// Of these the first `tokens` are those of the whole text.
    pub(super) encoding: Encoding,
    pub(super) tokens: usize,
    pub(super) size: Size,
}

/// How long a text is.
#[derive(Clone, Copy)]
pub(super) enum Size {
    /// It was read to its end.
    Tokens { tokens: usize, bytes: usize },
    /// Its tokens were not all counted.
    Bytes(usize),
}

impl Size {
    fn is_longer_than(self, other: Self) -> bool {
        match (self, other) {
            (Self::Tokens { tokens, .. }, Self::Tokens { tokens: other, .. }) => tokens > other,
            _ => self.bytes() > other.bytes(),
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::Tokens { bytes, .. } | Self::Bytes(bytes) => bytes,
        }
    }
}

impl Truncation {
    /// Cuts a text or a pair to `room` tokens in all; `None` where this strategy can't.
    pub(super) fn cut(
        self,
        first: Head,
        second: Option<Head>,
        room: usize,
        direction: TruncationDirection,
    ) -> Option<(Encoding, Option<Encoding>)> {
        let tokens = second.as_ref().map_or(0, |second| second.tokens);
        let of_first = match self {
            Self::LongestFirst => first_share(&first, second.as_ref(), room),
            _ if first.tokens + tokens <= room => first.tokens,
            // As in `transformers`, what is left of the second text is at least a token.
            Self::OnlySecond if first.tokens < room => first.tokens,
            Self::OnlySecond => return None,
        };
        let of_second = room - of_first.min(room);
        Some((
            keep(first, of_first, direction),
            second.map(|second| keep(second, of_second, direction)),
        ))
    }
}

/// Tokens that stay of the first text, where the longest is cut first.
fn first_share(first: &Head, second: Option<&Head>, room: usize) -> usize {
    let Some(second) = second else { return room };
    let half = room / 2;
    if first.tokens <= half {
        first.tokens
    } else if second.tokens <= half {
        room - second.tokens
    } else if first.size.is_longer_than(second.size) {
        room - half
    } else {
        half
    }
}

/// The first or last `length` tokens, of those that are sure.
fn keep(head: Head, length: usize, direction: TruncationDirection) -> Encoding {
    let mut encoding = head.encoding;
    let length = length.min(head.tokens);
    if length < encoding.len() {
        encoding.truncate(length, 0, direction);
        // What was cut off is kept beside it, and would be given special tokens too.
        encoding.take_overflowing();
    }
    encoding
}
