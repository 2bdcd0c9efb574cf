//! Low-rank terms of a packed linear, y += s · (x Aᵀ) Bᵀ, by the tile kernel: A is read as it lies,
//! B turned a few columns at a time.

use std::ops::{Deref, Range};

use candle_core::{Layout, Result, Storage};

use super::{COLUMNS, PackedLinear, Place, TileKernel};
use crate::ops::activation::Activation;
use crate::ops::crew::{in_parts, is_helped};
use crate::ops::lora::{LoraUpdate, RowUpdates};
use crate::ops::simd::vectorize;
use crate::ops::tile::{Finish, Left, Right, Start, Target};
use crate::ops::{contiguous, host};

/// Rows of a part of x Aᵀ that another core may take.
const PART_ROWS: usize = 16;

/// An update and its rows, its tensors held for reading.
pub(super) struct Borrowed<'a, Guard> {
    rows: &'a Range<usize>,
    update: &'a LoraUpdate,
    a: (Guard, &'a Layout),
    b: (Guard, &'a Layout),
}

pub(super) fn borrow(ranges: &[RowUpdates]) -> Vec<Borrowed<'_, impl Deref<Target = Storage>>> {
    let all = ranges.iter().flat_map(|RowUpdates { rows, updates }| {
        updates.iter().map(move |update| Borrowed {
            rows,
            update,
            a: update.a.storage_and_layout(),
            b: update.b.storage_and_layout(),
        })
    });
    all.collect()
}

/// What is added to the outputs of a linear.
#[derive(Default)]
pub(super) struct Terms<'a>(Vec<Term<'a>>);

struct Term<'a> {
    kernel: TileKernel,
    rows: Range<usize>,
    columns: Range<usize>,
    rank: usize,
    /// A, `[rank, in]`, and B, `[columns, rank]`.
    a: &'a [f32],
    b: &'a [f32],
    scale: f32,
    /// s · x Aᵀ, `[rows, rank]`.
    h: Vec<f32>,
}

impl<'a> Terms<'a> {
    /// The terms for rows `x` of the linear's inputs; `None` where the kernel can't add them.
    ///
    /// # Errors
    /// A tensor is not in host memory, or not in f32.
    pub(super) fn new(
        updates: &'a [Borrowed<'_, impl Deref<Target = Storage>>],
        linear: &PackedLinear,
        x: &[f32],
    ) -> Result<Option<Self>> {
        if updates.is_empty() {
            return Ok(Some(Self::default()));
        }
        let Some(kernel) = TileKernel::best() else {
            return Ok(None);
        };
        let mut terms = Vec::with_capacity(updates.len());
        for Borrowed { rows, update, a, b } in updates {
            let (rank, input) = update.a.dims2()?;
            let (width, b_rank) = update.b.dims2()?;
            let columns = update.column..update.column + width;
            let whole = |column: usize| column.is_multiple_of(COLUMNS) || column == linear.out;
            let fits = input == linear.input && b_rank == rank && columns.end <= linear.out;
            if !fits || update.map.is_some() || !whole(columns.start) || !whole(columns.end) {
                return Ok(None);
            }
            terms.push(Term {
                kernel,
                rows: (*rows).clone(),
                columns,
                rank,
                a: contiguous(host(&a.0)?, a.1)?,
                b: contiguous(host(&b.0)?, b.1)?,
                scale: update.scale as f32,
                h: vec![0f32; rows.len() * rank],
            });
        }
        narrow(&mut terms, x, linear.input);
        Ok(Some(Self(terms)))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds what belongs to some columns, from the begin of a panel to the end of one, of `y`.
    ///
    /// # Safety
    /// `y` must be memory of `[rows, out]` with values in these columns, which nobody else uses
    /// meanwhile.
    #[allow(unsafe_code)]
    pub(super) unsafe fn add(&self, columns: Range<usize>, y: *mut f32, out: usize) {
        let mut turned = Vec::new();
        for term in &self.0 {
            let start = columns.start.max(term.columns.start);
            let end = columns.end.min(term.columns.end);
            if start >= end || term.rank == 0 {
                continue;
            }
            let first = (start - term.columns.start) * term.rank;
            let last = (end - term.columns.start) * term.rank;
            turn(&term.b[first..last], term.rank, &mut turned);
            let left = Left {
                values: term.h.as_ptr(),
                stride: term.rank,
                rows: term.rows.len(),
                depth: term.rank,
            };
            let right = Right {
                values: turned.as_ptr(),
                stride: COLUMNS,
                panels: (end - start).div_ceil(COLUMNS),
                apart: term.rank * COLUMNS,
            };
            let finish = Finish {
                scale: 1.0,
                start: Start::Target,
                activation: Activation::None,
            };
            // SAFETY: `h` has a row of `rank` values for each row, `turned` that many rows of each
            // panel, and the target is the caller's.
            unsafe {
                let target = Target {
                    values: y.add(term.rows.start * out + start),
                    stride: out,
                    columns: end - start,
                };
                term.kernel.multiply(left, right, target, finish);
            }
        }
    }
}

/// Fills in `h` of all terms, some rows on other cores if they help.
fn narrow(terms: &mut [Term<'_>], x: &[f32], input: usize) {
    let per_part = if is_helped() { PART_ROWS } else { usize::MAX };
    let mut parts = Vec::new();
    for term in terms {
        let x = &x[term.rows.start * input..term.rows.end * input];
        let rows = term.rows.len().min(per_part).max(1);
        let of_part = x
            .chunks(rows * input)
            .zip(term.h.chunks_mut(rows * term.rank.max(1)));
        let (kernel, a, scale) = (term.kernel, term.a, term.scale);
        parts.extend(of_part.map(|(x, h)| {
            let place = Place(h.as_mut_ptr());
            (kernel, x, a, scale, place, h.len())
        }));
    }
    in_parts(parts.len(), &|part| {
        let (kernel, x, a, scale, place, len) = parts[part];
        // SAFETY: the chunks are apart, each is one part's, and the terms are borrowed till the end.
        #[allow(unsafe_code)]
        let h = unsafe { std::slice::from_raw_parts_mut(place.get(), len) };
        kernel.dots(x, a, input, scale, h);
    });
}

/// `[columns, rank]` in panels of sixteen columns, `[columns / 16][rank][16]`, zeros in place of
/// missing columns.
fn turn(b: &[f32], rank: usize, panels: &mut Vec<f32>) {
    panels.clear();
    panels.resize(b.len().next_multiple_of(COLUMNS * rank), 0.0);
    vectorize(
        #[inline(always)]
        || match rank {
            // With a length that the compiler knows, it turns a panel in registers.
            8 => turn_panels::<8>(b, panels),
            16 => turn_panels::<16>(b, panels),
            rank => turn_columns(b, rank, panels),
        },
    );
}

#[inline(always)]
fn turn_panels<const RANK: usize>(b: &[f32], panels: &mut [f32]) {
    let (rows, _) = b.as_chunks::<RANK>();
    let (to, _) = panels.as_chunks_mut::<COLUMNS>();
    let whole = rows.chunks_exact(COLUMNS);
    let rest = whole.remainder();
    let done = rows.len() - rest.len();
    for (rows, to) in whole.zip(to.chunks_exact_mut(RANK)) {
        for j in 0..RANK {
            for c in 0..COLUMNS {
                to[j][c] = rows[c][j];
            }
        }
    }
    turn_columns(rest.as_flattened(), RANK, &mut panels[done * RANK..]);
}

#[inline(always)]
fn turn_columns(b: &[f32], rank: usize, panels: &mut [f32]) {
    let of_panel = b.chunks(COLUMNS * rank);
    for (b, panel) in of_panel.zip(panels.chunks_exact_mut(COLUMNS * rank)) {
        for (column, b) in b.chunks_exact(rank).enumerate() {
            for (j, value) in b.iter().enumerate() {
                panel[j * COLUMNS + column] = *value;
            }
        }
    }
}
