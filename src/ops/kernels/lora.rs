//! Low-rank updates of many adapters at once, in two steps: `shrink` computes h = x Aᵀ of each
//! update's rows, `expand` adds scale · h Bᵀ to the linear's output together with all that happens
//! to it afterwards. (The division of Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285.)

use std::ops::Range;

use super::elementwise::kind;
use super::launch::{Args, Launch, Ptr, Scalar, pair, size};
use super::segments::{PAD, SegmentLinear, TILE, segment_linear};
use crate::ops::Activation;

/// The update of some columns of some rows of a linear's output.
#[derive(Clone, Debug)]
pub(in crate::ops) struct Update {
    pub rows: Range<usize>,
    /// `[rank, input]` of T.
    pub a: Ptr,
    /// `[width, rank]` of T.
    pub b: Ptr,
    /// f32 `[width]`: what the columns are multiplied with before.
    pub gain: Option<Ptr>,
    /// f32 `[width]`: what is added to them after the gain.
    pub shift: Option<Ptr>,
    pub scale: f32,
    pub rank: usize,
    /// First of the `width` columns.
    pub column: usize,
    pub width: usize,
}

impl Update {
    fn is_empty(&self) -> bool {
        self.rows.is_empty() || self.width == 0
    }

    fn values(&self) -> usize {
        if self.is_empty() {
            0
        } else {
            self.rows.len() * self.rank
        }
    }
}

/// f32 values of the scratch memory `h` of these updates.
pub(in crate::ops) fn shrink_values(updates: &[Update]) -> usize {
    updates.iter().map(Update::values).sum()
}

/// Where the h of each update begins, in values.
fn places(updates: &[Update]) -> impl Iterator<Item = usize> {
    updates.iter().scan(0, |next, update| {
        let place = *next;
        *next += update.values();
        Some(place)
    })
}

/// h = x Aᵀ of each update's rows, `[rows, rank]` one after the other, f32.
pub(in crate::ops) fn shrink(
    t: Scalar,
    x: Ptr,
    input: usize,
    updates: &[Update],
    h: Ptr,
) -> Vec<Launch> {
    let segments: Vec<SegmentLinear> = updates
        .iter()
        .zip(places(updates))
        .filter(|(update, _)| update.values() > 0)
        .map(|(update, output)| SegmentLinear {
            rows: update.rows.clone(),
            weight: update.a,
            bias: None,
            out_features: update.rank,
            output,
        })
        .collect();
    segment_linear(t, x, input, &segments, Activation::None, h, Scalar::F32)
}

/// Updates of one launch, by the 4 KB that arguments may have. Kernels find those that concern a
/// tile with two warps' votes.
pub(super) const UPDATES: usize = 64;
const WORDS: usize = 7;
/// Columns of the tile that a block computes.
const COLUMNS: usize = 64;
/// Ranks that a block takes at a time.
const RANKS: usize = 64;
const THREADS: usize = 128;

/// In place, for `y` of `[rows, out]`: y = act((y + bias) ∘ gain + shift + scale · h Bᵀ), gain to
/// product once for each update that concerns the value, in their order. `h` is what [`shrink`] has
/// written for the same updates.
#[allow(clippy::too_many_arguments)]
pub(in crate::ops) fn expand(
    t: Scalar,
    y: Ptr,
    rows: usize,
    out: usize,
    bias: Option<Ptr>,
    updates: &[Update],
    h: Ptr,
    activation: Activation,
) -> Vec<Launch> {
    if rows == 0 || out == 0 {
        return Vec::new();
    }
    let updates: Vec<Placed<'_>> = updates
        .iter()
        .zip(places(updates))
        .filter(|(update, _)| !update.is_empty())
        .collect();
    let mut launches = Vec::new();
    for (part, updates) in parts(rows, updates) {
        let passes = updates.len().div_ceil(UPDATES).max(1);
        for pass in 0..passes {
            let from = pass * UPDATES;
            let now = &updates[from..updates.len().min(from + UPDATES)];
            let (first, last) = (pass == 0, pass + 1 == passes);
            let bias = bias.filter(|_| first);
            let activation = if last { activation } else { Activation::None };
            if bias.is_none() && activation == Activation::None && now.is_empty() {
                continue;
            }
            launches.push(expand_part(
                t,
                y,
                part.clone(),
                out,
                bias,
                now,
                h,
                activation,
            ));
        }
    }
    launches
}

/// An update and where its h begins.
type Placed<'a> = (&'a Update, usize);

/// Cuts the rows so that the updates of a part concern its rows alone and fit one launch; only
/// updates that hang together by common rows may be more.
fn parts(rows: usize, updates: Vec<Placed<'_>>) -> Vec<(Range<usize>, Vec<Placed<'_>>)> {
    let mut by_row: Vec<usize> = (0..updates.len()).collect();
    by_row.sort_by_key(|&i| updates[i].0.rows.start);
    // Runs of updates that hang together, each with the row at which the next may begin.
    let mut runs: Vec<(usize, Vec<usize>)> = Vec::new();
    for i in by_row {
        let update = &updates[i].0.rows;
        match runs.last_mut() {
            Some((end, run)) if update.start < *end => {
                *end = (*end).max(update.end);
                run.push(i);
            }
            _ => runs.push((update.end, vec![i])),
        }
    }
    let mut parts: Vec<(usize, Vec<usize>)> = Vec::new();
    for (end, run) in runs {
        match parts.last_mut() {
            Some((part_end, part)) if part.len() + run.len() <= UPDATES => {
                *part_end = end;
                part.extend(run);
            }
            _ => parts.push((end, run)),
        }
    }
    match parts.last_mut() {
        Some((end, _)) => *end = rows,
        None => parts.push((rows, Vec::new())),
    }
    let mut start = 0;
    parts
        .into_iter()
        .map(|(end, mut part)| {
            part.sort_unstable();
            let range = start..end;
            start = end;
            (range, part.into_iter().map(|i| updates[i]).collect())
        })
        .collect()
}

#[allow(clippy::too_many_arguments)]
fn expand_part(
    t: Scalar,
    y: Ptr,
    rows: Range<usize>,
    out: usize,
    bias: Option<Ptr>,
    updates: &[Placed<'_>],
    h: Ptr,
    activation: Activation,
) -> Launch {
    let mut table = Vec::with_capacity(UPDATES * WORDS + 1);
    for (update, place) in updates {
        table.extend([
            pair(size(update.rows.start), size(update.rows.end)),
            update.b.0,
            update.gain.unwrap_or(Ptr::NULL).0,
            update.shift.unwrap_or(Ptr::NULL).0,
            *place as u64,
            pair(update.scale.to_bits(), size(update.rank)),
            pair(size(update.column), size(update.width)),
        ]);
    }
    table.resize(UPDATES * WORDS, 0);
    table.push(updates.len() as u64);
    let tiles = (out.div_ceil(COLUMNS), rows.len().div_ceil(TILE));
    let args = Args::default()
        .words(table)
        .ptr(y)
        .ptr(h)
        .optional(bias)
        .size(rows.start)
        .size(rows.end)
        .size(out)
        .size(kind(activation));
    // h twice (16-bit types: what rounding leaves beside it), B, and their product in f32.
    let staged = (2 * TILE + COLUMNS) * (RANKS + PAD) * t.size();
    let shared = staged + TILE * (COLUMNS + PAD) * 4;
    Launch::new("expand", t, (tiles.0 * tiles.1, 1), THREADS, args).with_shared(shared)
}
