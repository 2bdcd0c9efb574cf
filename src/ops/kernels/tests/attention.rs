//! Attention and its gradients, with all kinds of positions.

use super::*;
use crate::ops::{
    self, AttentionShape, Borders, Disentangled, PositionTable, Positions, RelativeRows,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    None,
    Bias,
    /// Whether the table has queries and keys.
    Disentangled(bool, bool),
}

const KINDS: [Kind; 5] = [
    Kind::None,
    Kind::Bias,
    Kind::Disentangled(true, true),
    Kind::Disentangled(true, false),
    Kind::Disentangled(false, true),
];

/// Rows of all tables here, less the first where a table begins there.
const ROWS: usize = 23;
const FIRST_ROW: usize = 1;

/// A batch: the lengths of its sequences, its heads, and how the last sequences have another table.
struct Case {
    t: Scalar,
    lengths: Vec<usize>,
    heads: usize,
    head_dim: usize,
    kind: Kind,
    with_bias: bool,
    /// Sequences of the first table, where there are two.
    divided: Option<usize>,
}

/// The inputs of a case, on both sides.
struct Inputs {
    qkv: Tensor,
    tables: Vec<Tensor>,
    shape: AttentionShape,
    of_qkv: Buffer,
    of_bias: Buffer,
    of_tables: Vec<Buffer>,
    borders: Buffer,
    row_of: Buffer,
    offsets: Vec<usize>,
}

impl Case {
    fn hidden(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Sequences of each table.
    fn shares(&self) -> Vec<usize> {
        let all = self.lengths.len();
        match (self.kind, self.divided) {
            (Kind::None, _) => Vec::new(),
            (_, Some(first)) => vec![first, all - first],
            (_, None) => vec![all],
        }
    }

    /// The shape of a table, and its type on the device.
    fn table(&self) -> ((usize, usize), Scalar) {
        match self.kind {
            Kind::None => ((0, 0), Scalar::F32),
            Kind::Bias => ((ROWS, self.heads), Scalar::F32),
            Kind::Disentangled(query, key) => {
                let terms = usize::from(query) + usize::from(key);
                ((ROWS - FIRST_ROW, terms * self.hidden()), self.t)
            }
        }
    }

    fn inputs(&self) -> Inputs {
        let mut offsets = vec![0];
        for length in &self.lengths {
            offsets.push(offsets.last().unwrap() + length);
        }
        let tokens = *offsets.last().unwrap();
        let hidden = self.hidden();
        let (qkv, of_qkv) = input(self.t, 1, (tokens, 3 * hidden));
        let (bias, of_bias) = vector(2, 3 * hidden);
        let qkv = if self.with_bias {
            qkv.broadcast_add(&bias).unwrap()
        } else {
            qkv
        };
        let longest = self.lengths.iter().copied().max().unwrap();
        let limit = longest + 3;
        // Rows rise with the distance, several distances a row; the outermost share theirs.
        let row_of: Vec<u32> = (0..2 * limit - 1)
            .map(|place| {
                let distance = place as i64 - (limit as i64 - 1);
                (12 + distance / 2).clamp(FIRST_ROW as i64, ROWS as i64 - 1) as u32
            })
            .collect();
        let (table, of_device) = self.table();
        let (tables, of_tables) = (0..self.shares().len())
            .map(|i| input(of_device, 3 + i as u64, table))
            .unzip();
        let rows = RelativeRows {
            row_of: row_of.clone().into(),
            limit,
            on_device: None,
        };
        let positions = match self.kind {
            Kind::None => Positions::None,
            Kind::Bias => Positions::Bias(rows),
            Kind::Disentangled(query, key) => Positions::Disentangled(Disentangled {
                rows,
                query,
                key,
                first_row: FIRST_ROW,
            }),
        };
        Inputs {
            qkv,
            tables,
            shape: AttentionShape {
                offsets: Borders::new(&offsets, None),
                heads: self.heads,
                scale: 1.0 / (self.head_dim as f32).sqrt(),
                positions,
            },
            of_qkv,
            of_bias,
            of_tables,
            borders: Buffer::indices(offsets.iter().copied()),
            row_of: Buffer::indices(row_of.into_iter().map(|row| row as usize)),
            offsets,
        }
    }

    fn plan<'a>(&self, inputs: &'a Inputs, out: &Buffer) -> AttentionPlan<'a> {
        let limit = self.lengths.iter().copied().max().unwrap() + 3;
        let row_of = inputs.row_of.ptr();
        let positions = match self.kind {
            Kind::None => DevicePositions::None,
            Kind::Bias => DevicePositions::Bias {
                table: inputs.of_tables[0].ptr(),
                row_of,
                limit,
            },
            Kind::Disentangled(query, key) => DevicePositions::Disentangled {
                tables: self
                    .shares()
                    .into_iter()
                    .zip(&inputs.of_tables)
                    .map(|(sequences, values)| DeviceTable {
                        sequences,
                        values: values.ptr(),
                        rows: ROWS - FIRST_ROW,
                    })
                    .collect(),
                row_of,
                limit,
                first_row: FIRST_ROW,
                query,
                key,
            },
        };
        AttentionPlan {
            qkv: inputs.of_qkv.ptr(),
            bias: self.with_bias.then(|| inputs.of_bias.ptr()),
            out: out.ptr(),
            borders: inputs.borders.ptr(),
            offsets: &inputs.offsets,
            heads: self.heads,
            head_dim: self.head_dim,
            scale: inputs.shape.scale,
            positions,
        }
    }

    fn position_tables(&self, tables: &[Tensor]) -> Vec<PositionTable> {
        let shares = self.shares().into_iter();
        shares
            .zip(tables)
            .map(|(sequences, values)| PositionTable {
                sequences,
                values: values.clone(),
            })
            .collect()
    }

    /// The forward pass, in the kernel named.
    fn check(&self, kernel: &str) {
        let inputs = self.inputs();
        let tokens = *inputs.offsets.last().unwrap();
        let out = Buffer::poisoned(self.t, tokens * self.hidden());
        let launches = attention(self.t, &self.plan(&inputs, &out));
        assert!(
            launches.iter().all(|launch| launch.kernel == kernel),
            "{launches:?}"
        );
        run(launches);
        let tables = self.position_tables(&inputs.tables);
        let expected = ops::attention(&inputs.qkv, None, &tables, inputs.shape.clone()).unwrap();
        // In tensor cores the sums of qkv and bias and the probabilities are rounded too.
        let rounded = if kernel.starts_with("attention_tiles") {
            2.0 * rounding(self.t)
        } else {
            1e-5
        };
        let of = format!(
            "{:?} of {} columns, {:?}",
            self.kind, self.head_dim, self.lengths
        );
        assert_close(&out.values(), &values(&expected), self.t, rounded, &of);
    }

    /// All gradients.
    fn check_gradients(&self) {
        let inputs = self.inputs();
        let tokens = *inputs.offsets.last().unwrap();
        let hidden = self.hidden();
        let unused = Buffer::poisoned(self.t, 0);
        let plan = self.plan(&inputs, &unused);
        let (gradient, of_gradient) = input(self.t, 9, (tokens, hidden));
        let dqkv = Buffer::poisoned(self.t, tokens * 3 * hidden);
        let scratch = Buffer::poisoned(Scalar::F32, attention_scratch_values(&plan));
        let (g, s) = (of_gradient.ptr(), scratch.ptr());
        run(attention_gradient(self.t, &plan, g, dqkv.ptr(), s));

        let trains = inputs.tables.len() == 1;
        let mut leaves = vec![&inputs.qkv];
        leaves.extend(inputs.tables.first().filter(|_| trains));
        let expected = gradients(&leaves, &gradient, |leaves| {
            let tables = if trains { &leaves[1..] } else { &inputs.tables };
            let tables = self.position_tables(tables);
            ops::attention(&leaves[0], None, &tables, inputs.shape.clone())
        });
        let of = format!("{:?} of {} columns", self.kind, self.head_dim);
        assert_close(&dqkv.values(), &expected[0], self.t, 2e-5, &of);
        if trains {
            let ((rows, columns), _) = self.table();
            let out = Buffer::poisoned(Scalar::F32, rows * columns);
            run(attention_table_gradient(
                self.t,
                &plan,
                g,
                s,
                rows,
                out.ptr(),
            ));
            assert_close(&out.values(), &expected[1], Scalar::F32, 2e-5, &of);
        }
    }
}

#[test]
fn tensor_cores_take_sequences_of_all_lengths() {
    // The mean decides how many warps have a head; the last has several strips of keys.
    let batches: [&[usize]; 6] = [
        &[1, 15, 16, 3],
        &[17, 33, 5, 0, 20],
        &[129, 1, 64, 31],
        &[300],
        &[8, 8, 8, 8, 100],
        &[2],
    ];
    for (i, lengths) in batches.into_iter().enumerate() {
        for t in [Scalar::F16, Scalar::Bf16] {
            for head_dim in [32, 64, 128] {
                for kind in [Kind::None, Kind::Bias] {
                    let case = Case {
                        t,
                        lengths: lengths.to_vec(),
                        heads: if lengths.len() > 3 { 3 } else { 2 },
                        head_dim,
                        kind,
                        with_bias: i % 2 == 0,
                        divided: None,
                    };
                    case.check(&format!("attention_tiles_{head_dim}_{}", t.name()));
                }
            }
        }
    }
}

#[test]
fn the_plain_kernel_takes_every_type_head_and_kind() {
    for t in SCALARS {
        for (i, kind) in KINDS.into_iter().enumerate() {
            for (head_dim, lengths) in [(3, vec![1, 15, 33]), (40, vec![16, 0, 17, 2])] {
                let case = Case {
                    t,
                    lengths,
                    heads: 2,
                    head_dim,
                    kind,
                    with_bias: i % 2 == 0,
                    divided: matches!(kind, Kind::Disentangled(..)).then_some(1),
                };
                case.check(&format!("attention_{}", t.name()));
            }
        }
    }
    for (head_dim, lengths) in [(32, vec![129, 7]), (64, vec![300])] {
        let case = Case {
            t: Scalar::F32,
            lengths,
            heads: 1,
            head_dim,
            kind: Kind::Bias,
            with_bias: true,
            divided: None,
        };
        case.check("attention_f32");
    }
}

#[test]
fn gradients_are_those_of_the_cpu() {
    for t in SCALARS {
        for (i, kind) in KINDS.into_iter().enumerate() {
            let batches = [
                (5, vec![1, 15, 33], None),
                (32, vec![16, 0, 17, 2], Some(2)),
                (8, vec![70, 3, 4, 5, 6], None),
            ];
            for (head_dim, lengths, divided) in batches {
                let case = Case {
                    t,
                    lengths,
                    heads: 2,
                    head_dim,
                    kind,
                    with_bias: i % 2 == 0,
                    divided: divided.filter(|_| matches!(kind, Kind::Disentangled(..))),
                };
                case.check_gradients();
            }
        }
    }
}
