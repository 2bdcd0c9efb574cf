//! Token ids of many sequences end to end, without padding.

use std::ops::Range;

/// One tokenised input, special tokens included. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub ids: Vec<u32>,
    /// Segment ids (`token_type_ids`), as long as `ids`.
    pub type_ids: Vec<u32>,
    /// Whether tokens were cut off to fit the limit.
    pub truncated: bool,
}

/// A packed batch: `[tokens]` ids with the borders of their sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBatch {
    /// Token ids, `[tokens]`.
    pub ids: Vec<u32>,
    /// Segment ids, `[tokens]`.
    pub type_ids: Vec<u32>,
    /// Where each sequence begins, and at the end the number of tokens: `[sequences + 1]`.
    pub offsets: Vec<usize>,
}

impl PackedBatch {
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a Sequence>) -> Self {
        let mut batch = Self {
            ids: Vec::new(),
            type_ids: Vec::new(),
            offsets: vec![0],
        };
        for sequence in sequences {
            batch.ids.extend_from_slice(&sequence.ids);
            batch.type_ids.extend_from_slice(&sequence.type_ids);
            batch.offsets.push(batch.ids.len());
        }
        batch
    }

    /// The sequences of some ranges, one range behind the other.
    pub fn select(&self, ranges: impl IntoIterator<Item = Range<usize>>) -> Self {
        let mut batch = Self::new([]);
        for i in ranges.into_iter().flatten() {
            let span = self.span(i);
            batch.ids.extend_from_slice(&self.ids[span.clone()]);
            batch.type_ids.extend_from_slice(&self.type_ids[span]);
            batch.offsets.push(batch.ids.len());
        }
        batch
    }

    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The tokens of sequence `i`.
    pub fn span(&self, i: usize) -> Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }
}
