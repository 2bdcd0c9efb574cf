//! Attention within each sequence of a packed batch, forward and backward.

use super::launch::{Args, Launch, Ptr, Scalar, pair, size};

/// What attention is over.
#[derive(Clone, Debug)]
pub(in crate::ops) struct AttentionPlan<'a> {
    /// `[tokens, 3 · hidden]` of T: Q, K and V side by side.
    pub qkv: Ptr,
    /// f32 `[3 · hidden]`, added to `qkv` as it is read.
    pub bias: Option<Ptr>,
    /// `[tokens, hidden]` of T; of no use to the gradients.
    pub out: Ptr,
    /// Sequence borders, u32 `[sequences + 1]`.
    pub borders: Ptr,
    /// The same on the host.
    pub offsets: &'a [usize],
    pub heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub positions: DevicePositions,
}

/// Relative positions with their tables in the device's memory. `row_of` is u32
/// `[2 · limit − 1]`, of which tables must have all rows that the longest sequence uses; no
/// sequence may be longer than `limit`.
#[derive(Clone, Debug)]
pub(in crate::ops) enum DevicePositions {
    None,
    Bias {
        /// f32 `[rows, heads]`.
        table: Ptr,
        row_of: Ptr,
        limit: usize,
    },
    Disentangled {
        tables: Vec<DeviceTable>,
        row_of: Ptr,
        limit: usize,
        first_row: usize,
        query: bool,
        key: bool,
    },
}

/// A table of the sequences that share it.
#[derive(Clone, Debug)]
pub(in crate::ops) struct DeviceTable {
    /// Number of sequences; tables follow each other in the batch's order.
    pub sequences: usize,
    /// `[rows, terms · hidden]` of T.
    pub values: Ptr,
    pub rows: usize,
}

/// Rows and columns of the products of tensor cores.
const TILE: usize = 16;
/// Keys that the kernel for tensor cores takes at a time.
const KEYS: usize = 32;
/// Distance of the rows of scores and of probabilities in shared memory.
const SCORES: usize = KEYS + 4;
const PROBABILITIES: usize = KEYS + 8;
/// Padding of rows of Q, K and V in shared memory.
const PAD: usize = 8;
/// Warps of a block of the other kernels: one a query, or one a key.
const WARPS: usize = 4;
const WARP: usize = 32;
const SHARED_LIMIT: usize = 48 << 10;

/// The most columns of a head that the kernels' shared memory has room for.
pub(in crate::ops) const LARGEST_HEAD: usize = SHARED_LIMIT / (4 * WARPS) / 4 - 16;

/// softmax(scale · Q Kᵀ + positions) V of every sequence.
///
/// # Panics
/// A head beyond [`LARGEST_HEAD`], a sequence beyond the limit of the positions, tables of another
/// number of sequences: the caller has checked them.
pub(in crate::ops) fn attention(t: Scalar, plan: &AttentionPlan<'_>) -> Vec<Launch> {
    plan.check();
    let kernel = plan.tile_kernel(t);
    let launch = |group: Group| match kernel {
        Some(kernel) => plan.tiles(kernel, t, group),
        None => {
            // Of each warp a query, its output and the weights of 32 keys.
            let shared = WARPS * (2 * plan.padded_head() + WARP) * 4;
            let args = plan.arguments(&group).ptr(plan.out);
            plan.by_token("attention", t, &group, args)
                .with_shared(shared)
        }
    };
    plan.groups().into_iter().map(launch).collect()
}

/// f32 values of the scratch memory of the gradients.
pub(in crate::ops) fn attention_scratch_values(plan: &AttentionPlan<'_>) -> usize {
    2 * plan.heads * plan.tokens()
}

/// The gradient of `qkv` (with the bias as read) for `gradient`, `[tokens, hidden]`, of the output:
/// `dqkv`, `[tokens, 3 · hidden]`. Sums in a fixed order. Leaves in `scratch` of each head and
/// query the logarithm of the sum of exponentials and Σⱼ P ∘ dP, both f32 `[heads, tokens]`.
pub(in crate::ops) fn attention_gradient(
    t: Scalar,
    plan: &AttentionPlan<'_>,
    gradient: Ptr,
    dqkv: Ptr,
    scratch: Ptr,
) -> Vec<Launch> {
    plan.check();
    let mut launches = Vec::new();
    let groups = plan.groups();
    for (kernel, vectors, chunks) in [
        // A query with its gradients, a chunk of the scores'.
        ("attention_gradient_query", 3, 1),
        // Key and value with their gradients, chunks of probabilities and of the scores'.
        ("attention_gradient_key", 4, 2),
    ] {
        launches.extend(groups.iter().map(|group| {
            let args = plan.arguments(group);
            let args = [gradient, dqkv, scratch].into_iter().fold(args, Args::ptr);
            let shared = WARPS * (vectors * plan.padded_head() + chunks * WARP) * 4;
            plan.by_token(kernel, t, group, args).with_shared(shared)
        }));
    }
    launches
}

/// The gradient of the one table of a batch, in its shape but f32: `out`, every value of which is
/// written, in a fixed order of summation, without atomics. `rows` are the table's; `scratch` is
/// what [`attention_gradient`] has left. Nothing where there are no positions.
///
/// # Panics
/// If there is more than one table.
pub(in crate::ops) fn attention_table_gradient(
    t: Scalar,
    plan: &AttentionPlan<'_>,
    gradient: Ptr,
    scratch: Ptr,
    rows: usize,
    out: Ptr,
) -> Option<Launch> {
    plan.check();
    let groups = plan.groups();
    assert!(
        groups.len() <= 1,
        "a position table that trains is the only one"
    );
    let (group, vectors) = match plan.positions {
        DevicePositions::None => return None,
        DevicePositions::Bias { .. } => (groups.into_iter().next()?, 0),
        DevicePositions::Disentangled { .. } => (groups.into_iter().next()?, 2),
    };
    if rows == 0 {
        return None;
    }
    let args = plan.arguments(&group);
    let args = args.ptr(gradient).ptr(scratch).ptr(out);
    let shared = WARPS * (vectors * plan.padded_head() + WARP) * 4;
    let grid = (rows, plan.heads);
    let launch = Launch::new("attention_table_gradient", t, grid, WARPS * WARP, args);
    Some(launch.with_shared(shared))
}

/// Sequences that share a table.
struct Group {
    first_sequence: usize,
    sequences: usize,
    longest: usize,
    values: Ptr,
    rows: usize,
}

impl AttentionPlan<'_> {
    fn tokens(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    fn sequences(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Vectors in shared memory are padded to what is read at once.
    fn padded_head(&self) -> usize {
        self.head_dim.next_multiple_of(8)
    }

    fn check(&self) {
        assert!(
            self.head_dim <= LARGEST_HEAD,
            "a head of {} columns exceeds {LARGEST_HEAD}",
            self.head_dim
        );
        let longest = self.longest(0..self.sequences());
        let limit = match &self.positions {
            DevicePositions::None => return,
            DevicePositions::Bias { limit, .. } => limit,
            DevicePositions::Disentangled { tables, limit, .. } => {
                let sequences: usize = tables.iter().map(|table| table.sequences).sum();
                assert_eq!(sequences, self.sequences(), "sequences of position tables");
                limit
            }
        };
        assert!(
            longest <= *limit,
            "a sequence of {longest} tokens exceeds {limit}"
        );
    }

    fn longest(&self, sequences: std::ops::Range<usize>) -> usize {
        self.offsets[sequences.start..=sequences.end]
            .windows(2)
            .map(|border| border[1] - border[0])
            .max()
            .unwrap_or(0)
    }

    /// Runs of sequences of one table; none without tokens.
    fn groups(&self) -> Vec<Group> {
        if self.tokens() == 0 || self.heads == 0 || self.head_dim == 0 {
            return Vec::new();
        }
        let tables = match &self.positions {
            DevicePositions::None => vec![(self.sequences(), Ptr::NULL, 0)],
            DevicePositions::Bias { table, .. } => vec![(self.sequences(), *table, 0)],
            DevicePositions::Disentangled { tables, .. } => tables
                .iter()
                .map(|table| (table.sequences, table.values, table.rows))
                .collect(),
        };
        let mut first_sequence = 0;
        let mut groups = Vec::with_capacity(tables.len());
        for (sequences, values, rows) in tables {
            let longest = self.longest(first_sequence..first_sequence + sequences);
            if longest > 0 {
                groups.push(Group {
                    first_sequence,
                    sequences,
                    longest,
                    values,
                    rows,
                });
            }
            first_sequence += sequences;
        }
        groups
    }

    /// The struct that all kernels begin with.
    fn arguments(&self, group: &Group) -> Args {
        let (kind, row_of, limit, first_row, query, key) = match self.positions {
            DevicePositions::None => (0, Ptr::NULL, 0, 0, false, false),
            DevicePositions::Bias { row_of, limit, .. } => (1, row_of, limit, 0, false, false),
            DevicePositions::Disentangled {
                row_of,
                limit,
                first_row,
                query,
                key,
                ..
            } => (2, row_of, limit, first_row, query, key),
        };
        Args::default().words(vec![
            self.qkv.0,
            self.bias.unwrap_or(Ptr::NULL).0,
            self.borders.0,
            group.values.0,
            row_of.0,
            pair(kind, size(limit)),
            pair(size(group.rows), size(first_row)),
            pair(query.into(), key.into()),
            pair(size(group.first_sequence), size(group.sequences)),
            pair(size(self.heads), size(self.head_dim)),
            pair(self.scale.to_bits(), size(self.tokens())),
            pair(size(group.longest), 0),
        ])
    }

    /// A launch with a warp for each token of each head.
    fn by_token(&self, kernel: &str, t: Scalar, group: &Group, args: Args) -> Launch {
        let grid = (group.sequences * self.heads, group.longest.div_ceil(WARPS));
        Launch::new(kernel, t, grid, WARPS * WARP, args)
    }

    /// The kernel for tensor cores, where they apply.
    fn tile_kernel(&self, t: Scalar) -> Option<&'static str> {
        let disentangled = matches!(self.positions, DevicePositions::Disentangled { .. });
        let aligned = self.qkv.is_aligned() && self.out.is_aligned();
        if t == Scalar::F32 || disentangled || !aligned {
            return None;
        }
        match self.head_dim {
            32 => Some("attention_tiles_32"),
            64 => Some("attention_tiles_64"),
            128 => Some("attention_tiles_128"),
            _ => None,
        }
    }

    /// As many warps work on a head as sequences of the usual length keep busy; a block takes
    /// several heads where those are few.
    fn tiles(&self, kernel: &str, t: Scalar, group: Group) -> Launch {
        let mean = self.tokens().div_ceil(self.sequences());
        let (warps_per_head, warps) = match mean {
            0..=16 => (1, 2),
            17..=32 if self.head_dim > 64 => (2, 2),
            17..=32 => (2, 4),
            _ => (4, 4),
        };
        let heads_per_block = warps / warps_per_head;
        let row = self.head_dim + PAD;
        let keys_and_values = heads_per_block * 2 * KEYS * row * t.size();
        let scores = TILE * SCORES * 4 + TILE * PROBABILITIES * t.size();
        let queries = TILE * row * t.size();
        let biases = (KEYS + TILE) * 4;
        let of_warp = scores.max(queries) + biases;
        let grid = (
            (group.sequences * self.heads).div_ceil(heads_per_block),
            group.longest.div_ceil(warps_per_head * TILE),
        );
        let args = self.arguments(&group).ptr(self.out).size(warps_per_head);
        Launch::new(kernel, t, grid, warps * WARP, args)
            .with_shared(keys_and_values + warps * of_warp)
    }
}
