//! Attention by the kernels, forward and backward.

use candle_core::cuda_backend::CudaStorage;
use candle_core::{DType, Result, Shape, Tensor};

use super::ops::Argument;
use super::runtime::launch;
use super::view::{Output, View, place_of};
use crate::ops::attention::{AttentionShape, PositionTable, Positions, RelativeRows};
use crate::ops::kernels::{self, AttentionPlan, DevicePositions, DeviceTable, Ptr};

type Made = Result<(CudaStorage, Shape)>;

/// Attention over `qkv`, `[tokens, 3 · hidden]`, to which `bias` is still to be added.
pub(in crate::ops) fn attention(
    (qkv, layout): Argument<'_>,
    bias: Option<&Tensor>,
    shape: &AttentionShape,
    tables: &[PositionTable],
) -> Made {
    let qkv = View::new(qkv, layout)?;
    let tables = of_tables(&qkv, shape, tables)?;
    forward(&qkv, bias, shape, &tables)
}

/// The same with the table of positions as an argument, which is that of all sequences.
pub(in crate::ops) fn attention_by_table(
    (qkv, layout): Argument<'_>,
    (table, table_layout): Argument<'_>,
    shape: &AttentionShape,
) -> Made {
    let qkv = View::new(qkv, layout)?;
    let table = View::new(table, table_layout)?;
    let table = Table::new(&qkv, shape, table, shape.offsets.len().saturating_sub(1))?;
    forward(&qkv, None, shape, &[table])
}

fn forward(
    qkv: &View<'_>,
    bias: Option<&Tensor>,
    shape: &AttentionShape,
    tables: &[Table],
) -> Made {
    let (tokens, hidden) = dims(qkv, shape)?;
    let bias = bias.map(|bias| place_of(bias, DType::F32, "the bias of Q, K and V"));
    let out = Output::new(qkv.device, qkv.dtype, tokens * hidden)?;
    let plan = AttentionPlan {
        bias: bias.transpose()?,
        out: out.at,
        ..plan(qkv, shape, hidden, tables)?
    };
    launch(qkv.device, kernels::attention(qkv.scalar()?, &plan))?;
    Ok(out.shaped((tokens, hidden)))
}

/// The gradient of `qkv` for that of the output.
pub(in crate::ops) fn attention_gradient(
    (qkv, layout): Argument<'_>,
    (gradient, gradient_layout): Argument<'_>,
    shape: &AttentionShape,
    tables: &[PositionTable],
) -> Made {
    let qkv = View::new(qkv, layout)?;
    let gradient = View::new(gradient, gradient_layout)?;
    let tables = of_tables(&qkv, shape, tables)?;
    let (tokens, hidden) = dims(&qkv, shape)?;
    let plan = plan(&qkv, shape, hidden, &tables)?;
    let (dqkv, _) = backward(&qkv, gradient, &plan)?;
    Ok(dqkv.shaped((tokens, 3 * hidden)))
}

/// The gradient of the one table of a batch, in its shape and in f32.
pub(in crate::ops) fn attention_table_gradient(
    (qkv, layout): Argument<'_>,
    (gradient, gradient_layout): Argument<'_>,
    shape: &AttentionShape,
    tables: &[PositionTable],
) -> Made {
    let [table] = tables else {
        candle_core::bail!("a position table that trains must be the only one");
    };
    let table_shape = table.values.shape().clone();
    let (rows, _) = table.values.dims2()?;
    let qkv = View::new(qkv, layout)?;
    let gradient = View::new(gradient, gradient_layout)?;
    let tables = of_tables(&qkv, shape, tables)?;
    let (_, hidden) = dims(&qkv, shape)?;
    let plan = plan(&qkv, shape, hidden, &tables)?;
    let at = gradient.at;
    // What it leaves of each query is what the table's gradient goes by.
    let (_, scratch) = backward(&qkv, gradient, &plan)?;
    let out = Output::new(qkv.device, DType::F32, table_shape.elem_count())?;
    let t = qkv.scalar()?;
    let made = kernels::attention_table_gradient(t, &plan, at, scratch.at, rows, out.at);
    launch(qkv.device, made)?;
    Ok(out.shaped(table_shape))
}

/// The gradient of `qkv`, and the scratch memory that it leaves.
fn backward(
    qkv: &View<'_>,
    gradient: View<'_>,
    plan: &AttentionPlan<'_>,
) -> Result<(Output, Output)> {
    let gradient = gradient.of(qkv.dtype, "the gradient of attention")?;
    let dqkv = Output::new(qkv.device, qkv.dtype, qkv.count())?;
    let count = kernels::attention_scratch_values(plan);
    let scratch = Output::new(qkv.device, DType::F32, count)?;
    let t = qkv.scalar()?;
    let made = kernels::attention_gradient(t, plan, gradient.at, dqkv.at, scratch.at);
    launch(qkv.device, made)?;
    Ok((dqkv, scratch))
}

fn dims(qkv: &View<'_>, shape: &AttentionShape) -> Result<(usize, usize)> {
    let (tokens, three_hidden) = qkv.dims2()?;
    let (last, heads) = (shape.offsets.last(), shape.heads);
    let hidden = three_hidden / 3;
    if last != Some(&tokens) || !three_hidden.is_multiple_of(3 * heads) {
        candle_core::bail!(
            "attention over {:?} does not fit {heads} heads and {last:?} tokens",
            qkv.dims()
        );
    }
    if hidden / heads > kernels::LARGEST_HEAD {
        candle_core::bail!("heads of {} columns are too wide for a GPU", hidden / heads);
    }
    Ok((tokens, hidden))
}

/// A position table on the device, checked.
struct Table {
    sequences: usize,
    values: Ptr,
    rows: usize,
}

impl Table {
    fn new(
        qkv: &View<'_>,
        shape: &AttentionShape,
        table: View<'_>,
        sequences: usize,
    ) -> Result<Self> {
        let dtype = match shape.positions {
            Positions::Bias(_) => DType::F32,
            _ => qkv.dtype,
        };
        let (rows, _) = table.dims2()?;
        let table = table.of(dtype, "a table of positions")?;
        Ok(Self {
            sequences,
            values: table.at,
            rows,
        })
    }
}

fn of_tables(
    qkv: &View<'_>,
    shape: &AttentionShape,
    tables: &[PositionTable],
) -> Result<Vec<Table>> {
    let (_, hidden) = dims(qkv, shape)?;
    shape.check_tables(hidden, tables)?;
    tables
        .iter()
        .map(|table| {
            super::view::with_view(&table.values, |view| {
                Table::new(qkv, shape, view, table.sequences)
            })
        })
        .collect()
}

/// The plan of a forward or backward pass, without what they write.
fn plan<'a>(
    qkv: &View<'_>,
    shape: &'a AttentionShape,
    hidden: usize,
    tables: &[Table],
) -> Result<AttentionPlan<'a>> {
    let row_of = |rows: &RelativeRows| match &rows.on_device {
        Some(row_of) => place_of(row_of, DType::U32, "the rows of relative positions"),
        None => candle_core::bail!("the rows of relative positions are in host memory"),
    };
    let positions = match (&shape.positions, tables) {
        (Positions::None, _) => DevicePositions::None,
        (Positions::Bias(rows), [table]) => DevicePositions::Bias {
            table: table.values,
            row_of: row_of(rows)?,
            limit: rows.limit,
        },
        (Positions::Bias(_), _) => candle_core::bail!("a bias of positions has one table"),
        (Positions::Disentangled(terms), tables) => DevicePositions::Disentangled {
            tables: tables
                .iter()
                .map(|table| DeviceTable {
                    sequences: table.sequences,
                    values: table.values,
                    rows: table.rows,
                })
                .collect(),
            row_of: row_of(&terms.rows)?,
            limit: terms.rows.limit,
            first_row: terms.first_row,
            query: terms.query,
            key: terms.key,
        },
    };
    Ok(AttentionPlan {
        qkv: qkv.at,
        bias: None,
        // Only the forward pass writes there.
        out: qkv.at,
        borders: place_of(shape.offsets.on_device()?, DType::U32, "the borders")?,
        offsets: &shape.offsets,
        heads: shape.heads,
        head_dim: hidden / shape.heads,
        scale: shape.scale,
        positions,
    })
}
