//! What relative positions add to the scores of attention.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::Head;
use crate::ops::matrix::{Into, Matrix, MatrixMut, multiply};
use crate::ops::{contiguous, host};

/// How the relative position of two tokens takes part in their score.
#[derive(Clone, Debug)]
pub enum Positions {
    /// Not at all.
    None,
    /// By a number for each relative position and head (MPNet, T5): a table of `[rows, heads]`.
    Bias(RelativeRows),
    /// By vectors (DeBERTa's disentangled attention, arXiv 2006.03654): a table of
    /// `[rows, terms · hidden]`, of each relative position the query and the key, side by side.
    Disentangled(Disentangled),
}

/// DeBERTa's two terms.
#[derive(Clone, Debug)]
pub struct Disentangled {
    pub rows: RelativeRows,
    /// Position to content (p2c): kⱼ · query of the position.
    pub query: bool,
    /// Content to position (c2p): qᵢ · key of the position.
    pub key: bool,
    /// The row with which the table begins, where only the rows in use are there.
    pub first_row: usize,
}

/// The table's row for every relative position j − i in (−limit, limit).
#[derive(Clone, Debug)]
pub struct RelativeRows {
    /// `row_of[j − i + limit − 1]`; never falls or never rises.
    pub row_of: Arc<[u32]>,
    pub limit: usize,
    /// `row_of` where the batches are, if that is not host memory.
    pub on_device: Option<Tensor>,
}

impl RelativeRows {
    pub(super) fn row(&self, i: usize, j: usize) -> usize {
        self.row_of[self.limit - 1 + j - i] as usize
    }

    /// First and last row that sequences of `longest` tokens use.
    ///
    /// # Errors
    /// A sequence beyond the limit.
    pub fn used(&self, longest: usize) -> Result<(usize, usize)> {
        if longest > self.limit {
            candle_core::bail!("a sequence of {longest} tokens exceeds {}", self.limit);
        }
        let last = longest.saturating_sub(1);
        let (one, other) = (self.row(last, 0), self.row(0, last));
        Ok((one.min(other), one.max(other)))
    }
}

/// A table of the sequences that share it.
#[derive(Clone, Debug)]
pub struct PositionTable {
    /// Number of sequences; tables follow each other in the batch's order.
    pub sequences: usize,
    pub values: Tensor,
}

/// Calls `f` with the table of every sequence; an empty one where positions play no part.
pub(super) fn with_tables<R>(
    tables: &[PositionTable],
    sequences: usize,
    f: impl FnOnce(&[&[f32]]) -> Result<R>,
) -> Result<R> {
    let storages: Vec<_> = tables
        .iter()
        .map(|table| table.values.storage_and_layout())
        .collect();
    let mut of_sequences: Vec<&[f32]> = Vec::with_capacity(sequences);
    for (table, (storage, layout)) in tables.iter().zip(&storages) {
        let values = contiguous(host(storage)?, layout)?;
        of_sequences.resize(of_sequences.len() + table.sequences, values);
    }
    if tables.is_empty() {
        of_sequences.resize(sequences, &[]);
    }
    if of_sequences.len() != sequences {
        candle_core::bail!(
            "position tables of {} sequences for {sequences}",
            of_sequences.len()
        );
    }
    f(&of_sequences)
}

impl Positions {
    fn rows(&self) -> Option<&RelativeRows> {
        match self {
            Self::None => None,
            Self::Bias(rows) => Some(rows),
            Self::Disentangled(terms) => Some(&terms.rows),
        }
    }

    /// Columns of a table.
    pub(super) fn columns(&self, hidden: usize, heads: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Bias(_) => heads,
            Self::Disentangled(terms) => terms.columns(hidden),
        }
    }

    /// Whether a table has all rows that sequences of `longest` tokens use.
    pub(super) fn check(&self, longest: usize, table: usize, columns: usize) -> Result<()> {
        let Some(rows) = self.rows() else {
            return Ok(());
        };
        let (first, last) = rows.used(longest)?;
        let begin = match self {
            Self::Disentangled(terms) => terms.first_row,
            _ => 0,
        };
        let fits = first >= begin && (last + 1 - begin) * columns <= table;
        if columns == 0 || !table.is_multiple_of(columns) || !fits {
            candle_core::bail!(
                "a position table of {table} values, {columns} a row from row {begin}, lacks rows \
                 {first} to {last}"
            );
        }
        Ok(())
    }

    /// Adds to the scores of a head, `[len, len]`, rows `stride` values apart; `scratch` is memory
    /// for use here.
    pub(super) fn add_scores(
        &self,
        head: &Head<'_>,
        table: &[f32],
        scale: f32,
        scores: &mut [f32],
        stride: usize,
        scratch: &mut Vec<f32>,
    ) {
        let len = head.len;
        match self {
            Self::None => {}
            Self::Bias(rows) => {
                // By j − i, so that each row of scores goes by a run of them.
                let reach = len.saturating_sub(1);
                scratch.clear();
                scratch.extend((0..len + reach).map(|offset| {
                    let row = rows.row_of[rows.limit - 1 + offset - reach] as usize;
                    table[row * head.heads + head.head]
                }));
                for (i, row) in scores.chunks_exact_mut(stride).enumerate() {
                    let bias = &scratch[reach - i..][..len];
                    row.iter_mut()
                        .zip(bias)
                        .for_each(|(score, bias)| *score += bias);
                }
            }
            Self::Disentangled(terms) => {
                let of = terms.of_head(head, table);
                let mut add = |content, position, by_key: bool| {
                    scratch.resize(len * of.rows, 0.0);
                    let products = MatrixMut::new(scratch, len, of.rows, of.rows);
                    multiply(products, Into::Overwrite, scale, content, position);
                    for (i, row) in scores.chunks_exact_mut(stride).enumerate() {
                        for (j, score) in row[..len].iter_mut().enumerate() {
                            let token = if by_key { j } else { i };
                            *score += scratch[token * of.rows + terms.row(i, j)];
                        }
                    }
                };
                if let Some(key) = of.key {
                    add(head.q, key.transposed(), false);
                }
                if let Some(query) = of.query {
                    add(head.k, query.transposed(), true);
                }
            }
        }
    }

    /// What goes through the positions to the gradients of a head's Q and K, both `[len, width]`,
    /// for the gradient `ds` of its scores: calls `add` with the factors of a product.
    pub(super) fn add_content_gradients(
        &self,
        head: &Head<'_>,
        table: &[f32],
        ds: &[f32],
        scratch: &mut Vec<f32>,
        mut add: impl FnMut(Content, Matrix<'_>, Matrix<'_>),
    ) {
        let Self::Disentangled(terms) = self else {
            return;
        };
        let of = terms.of_head(head, table);
        if let Some(key) = of.key {
            let by_row = terms.sum_by_row(head.len, of.rows, ds, false, scratch);
            add(Content::Query, by_row, key);
        }
        if let Some(query) = of.query {
            let by_row = terms.sum_by_row(head.len, of.rows, ds, true, scratch);
            add(Content::Key, by_row, query);
        }
    }

    /// Adds to the gradient of a table.
    pub(super) fn add_table_gradient(
        &self,
        head: &Head<'_>,
        scale: f32,
        ds: &[f32],
        gradient: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let len = head.len;
        match self {
            Self::None => {}
            Self::Bias(rows) => {
                for i in 0..len {
                    for j in 0..len {
                        gradient[rows.row(i, j) * head.heads + head.head] += ds[i * len + j];
                    }
                }
            }
            Self::Disentangled(terms) => {
                let columns = terms.columns(head.heads * head.width);
                let rows = gradient.len() / columns;
                let (query, key) = terms.offsets(head);
                let mut add = |offset: Option<usize>, by_key, content| {
                    let Some(offset) = offset else { return };
                    let by_row = terms.sum_by_row(len, rows, ds, by_key, scratch);
                    let target = MatrixMut::new(&mut gradient[offset..], rows, head.width, columns);
                    let transposed = by_row.transposed();
                    multiply(target, Into::Accumulate, scale, transposed, content);
                };
                add(key, false, head.q);
                add(query, true, head.k);
            }
        }
    }
}

/// Which of a token's vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Query,
    Key,
}

/// The part of a table that belongs to a head; each `[rows, width]`.
struct HeadTable<'a> {
    rows: usize,
    query: Option<Matrix<'a>>,
    key: Option<Matrix<'a>>,
}

impl Disentangled {
    fn columns(&self, hidden: usize) -> usize {
        (usize::from(self.query) + usize::from(self.key)) * hidden
    }

    fn row(&self, i: usize, j: usize) -> usize {
        self.rows.row(i, j) - self.first_row
    }

    /// First column of the head's query and key.
    fn offsets(&self, head: &Head<'_>) -> (Option<usize>, Option<usize>) {
        let query = head.head * head.width;
        let before = self.columns_of_queries(head);
        (
            self.query.then_some(query),
            self.key.then_some(before + query),
        )
    }

    fn columns_of_queries(&self, head: &Head<'_>) -> usize {
        usize::from(self.query) * head.heads * head.width
    }

    fn of_head<'a>(&self, head: &Head<'_>, table: &'a [f32]) -> HeadTable<'a> {
        let columns = self.columns(head.heads * head.width);
        let rows = table.len() / columns;
        let (query, key) = self.offsets(head);
        let part = |offset: usize| Matrix::new(&table[offset..], rows, head.width, columns);
        HeadTable {
            rows,
            query: query.map(part),
            key: key.map(part),
        }
    }

    /// Sums `ds` over what shares a token (the key's or the query's) and a row of the table:
    /// `[len, rows]`.
    fn sum_by_row<'a>(
        &self,
        len: usize,
        rows: usize,
        ds: &[f32],
        by_key: bool,
        scratch: &'a mut Vec<f32>,
    ) -> Matrix<'a> {
        scratch.clear();
        scratch.resize(len * rows, 0.0);
        for i in 0..len {
            for j in 0..len {
                let token = if by_key { j } else { i };
                scratch[token * rows + self.row(i, j)] += ds[i * len + j];
            }
        }
        Matrix::new(scratch, len, rows, rows)
    }
}
