//! Attention with all kinds of positions, and the windows of a convolution.

use std::sync::Arc;

use super::*;
use crate::ops::{
    self, AttentionShape, Borders, Disentangled, PositionTable, Positions, RelativeRows,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    None,
    Bias,
    Disentangled,
}

/// A batch on both sides.
struct Batch {
    offsets: Vec<usize>,
    heads: usize,
    head_dim: usize,
    kind: Kind,
    row_of: Vec<u32>,
}

const ROWS: usize = 32;

impl Batch {
    fn draw(draw: &mut Draw, kind: Kind) -> Self {
        let lengths = draw.lengths();
        let mut offsets = vec![0];
        for length in &lengths {
            offsets.push(offsets[offsets.len() - 1] + length);
        }
        let longest = lengths.iter().copied().max().unwrap();
        // Rows rise with the distance; the outermost share theirs.
        let row_of = (0..2 * longest - 1)
            .map(|place| (16 + (place as i64 - longest as i64 + 1) / 2).clamp(0, 31) as u32)
            .collect();
        Self {
            offsets,
            heads: draw.number(1, 12),
            head_dim: draw.one_of(&[8, 24, 32, 64, 128]),
            kind,
            row_of,
        }
    }

    fn tokens(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    fn hidden(&self) -> usize {
        self.heads * self.head_dim
    }

    fn table(&self, draw: &mut Draw) -> Option<Input> {
        match self.kind {
            Kind::None => None,
            Kind::Bias => Some(InF32(draw.tensor((ROWS, self.heads)))),
            Kind::Disentangled => Some(InType(draw.tensor((ROWS, 2 * self.hidden())))),
        }
    }

    /// As the op takes it beside tensors of a device.
    fn shape(&self, device: &Device) -> AttentionShape {
        let on_device = |values: &[u32]| {
            let uploaded = (!device.is_cpu()).then(|| device::upload(device, &[values]).unwrap());
            uploaded.map(|all| all[0].clone())
        };
        let offsets: Vec<u32> = self.offsets.iter().map(|offset| *offset as u32).collect();
        let rows = RelativeRows {
            row_of: Arc::from(self.row_of.as_slice()),
            limit: self.row_of.len().div_ceil(2),
            on_device: on_device(&self.row_of),
        };
        AttentionShape {
            offsets: Borders::new(&self.offsets, on_device(&offsets)),
            heads: self.heads,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            positions: match self.kind {
                Kind::None => Positions::None,
                Kind::Bias => Positions::Bias(rows),
                Kind::Disentangled => Positions::Disentangled(Disentangled {
                    rows,
                    query: true,
                    key: true,
                    first_row: 0,
                }),
            },
        }
    }

    fn attention(&self, t: &[Tensor], bias: Option<&Tensor>) -> Result<Tensor> {
        let tables = t.get(1).map(|values| PositionTable {
            sequences: self.offsets.len() - 1,
            values: values.clone(),
        });
        let tables: Vec<_> = tables.into_iter().collect();
        ops::attention(&t[0], bias, &tables, self.shape(t[0].device()))
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn attention_over_short_and_long_sequences() {
    for kind in [Kind::None, Kind::Bias, Kind::Disentangled] {
        for dtype in TYPES {
            for seed in 0..8 {
                let mut draw = Draw::new(seed);
                let batch = Batch::draw(&mut draw, kind);
                let qkv = draw.tensor((batch.tokens(), 3 * batch.hidden()));
                let (bias, table) = (draw.tensor(3 * batch.hidden()), batch.table(&mut draw));
                let inputs: Vec<_> = [Some(InType(qkv)), table].into_iter().flatten().collect();
                let of = format!(
                    "attention {kind:?}, {:?}, {} heads of {}",
                    batch.offsets, batch.heads, batch.head_dim
                );
                assert_gradients(&of, dtype, &inputs, |t| batch.attention(t, None));
                let all = [&inputs[..], &[InF32(bias)]].concat();
                assert_values(&of, dtype, &all, |t| {
                    let (bias, rest) = t.split_last().unwrap();
                    batch.attention(rest, Some(bias))
                });
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn windows() {
    for dtype in TYPES {
        for seed in 0..6 {
            let mut draw = Draw::new(seed);
            let batch = Batch::draw(&mut draw, Kind::None);
            let kernel = draw.one_of(&[1, 3, 5]);
            let inputs = [InType(draw.tensor((batch.tokens(), batch.hidden())))];
            let of = format!("unfold {:?}, {kernel}", batch.offsets);
            assert_gradients(&of, dtype, &inputs, |t| {
                let borders = batch.shape(t[0].device()).offsets;
                ops::unfold(&t[0], &borders, kernel)
            });
        }
    }
}
