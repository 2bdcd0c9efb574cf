//! Attention beside finite differences and its own definition.

use super::*;
use crate::ops::gradient_check::{assert_gradient, random};

const HEADS: usize = 2;
const HIDDEN: usize = 6;

fn shape(offsets: &[usize], positions: Positions) -> AttentionShape {
    AttentionShape {
        offsets: Borders::new(offsets, None),
        heads: HEADS,
        scale: 0.5,
        positions,
    }
}

/// Positions up to four apart; the rows 1 to 6 of a table, the outer ones shared.
fn rows() -> RelativeRows {
    let row_of: Vec<u32> = (0..9).map(|distance: u32| distance.clamp(1, 6)).collect();
    RelativeRows {
        row_of: row_of.into(),
        limit: 5,
        on_device: None,
    }
}

fn disentangled(query: bool, key: bool) -> Positions {
    Positions::Disentangled(Disentangled {
        rows: rows(),
        query,
        key,
        first_row: 1,
    })
}

/// All kinds of positions, and the columns of a table of six rows (seven for a bias).
fn kinds() -> [(Positions, (usize, usize)); 4] {
    [
        (Positions::Bias(rows()), (7, HEADS)),
        (disentangled(true, true), (6, 2 * HIDDEN)),
        (disentangled(true, false), (6, HIDDEN)),
        (disentangled(false, true), (6, HIDDEN)),
    ]
}

fn whole(values: &Tensor, sequences: usize) -> [PositionTable; 1] {
    [PositionTable {
        sequences,
        values: values.clone(),
    }]
}

#[test]
fn backward_agrees_with_finite_differences() {
    let qkv = random(1, (8, 3 * HIDDEN));
    let offsets = [0, 3, 4, 8];
    assert_gradient(std::slice::from_ref(&qkv), |t| {
        attention(&t[0], None, &[], shape(&offsets, Positions::None))
    });
    for (positions, dims) in kinds() {
        let table = random(2, dims);
        assert_gradient(std::slice::from_ref(&qkv), |t| {
            let frozen = whole(&table, 3);
            attention(&t[0], None, &frozen, shape(&offsets, positions.clone()))
        });
        assert_gradient(&[qkv.clone(), table], |t| {
            attention(
                &t[0],
                None,
                &whole(&t[1], 3),
                shape(&offsets, positions.clone()),
            )
        });
    }
}

#[test]
fn disentangled_scores_are_the_sum_of_their_terms() {
    let (query, key) = (random(3, (6, HIDDEN)), random(4, (6, HIDDEN)));
    let table = Tensor::cat(&[&query, &key], 1).unwrap();
    let qkv = random(1, (4, 3 * HIDDEN));
    let found = attention(
        &qkv,
        None,
        &whole(&table, 1),
        shape(&[0, 4], disentangled(true, true)),
    );
    let found = found.unwrap().to_vec2::<f32>().unwrap();

    let rows = rows();
    let values = qkv.to_vec2::<f32>().unwrap();
    let (query, key) = (
        query.to_vec2::<f32>().unwrap(),
        key.to_vec2::<f32>().unwrap(),
    );
    let width = HIDDEN / HEADS;
    for head in 0..HEADS {
        let columns = head * width..(head + 1) * width;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        for i in 0..4 {
            let weights: Vec<f32> = (0..4)
                .map(|j| {
                    let q = &values[i][columns.clone()];
                    let k = &values[j][HIDDEN..][columns.clone()];
                    let row = rows.row(i, j) - 1;
                    let position =
                        dot(q, &key[row][columns.clone()]) + dot(k, &query[row][columns.clone()]);
                    (0.5 * (dot(q, k) + position)).exp()
                })
                .collect();
            let total: f32 = weights.iter().sum();
            for column in columns.clone() {
                let expected: f32 = (0..4)
                    .map(|j| weights[j] / total * values[j][2 * HIDDEN + column])
                    .sum();
                let difference = (found[i][column] - expected).abs();
                assert!(difference < 1e-5, "{} {expected}", found[i][column]);
            }
        }
    }
}

#[test]
fn a_sequence_does_not_see_its_neighbours() {
    let qkv = random(1, (8, 18));
    for (positions, dims) in kinds() {
        let (table, other) = (random(2, dims), random(3, dims));
        let tables = [
            PositionTable {
                sequences: 1,
                values: other,
            },
            PositionTable {
                sequences: 1,
                values: table.clone(),
            },
        ];
        let together =
            attention(&qkv, None, &tables, shape(&[0, 3, 8], positions.clone())).unwrap();
        let alone = qkv.narrow(0, 3, 5).unwrap().contiguous().unwrap();
        let alone = attention(&alone, None, &whole(&table, 1), shape(&[0, 5], positions)).unwrap();
        assert_eq!(
            together.narrow(0, 3, 5).unwrap().to_vec2::<f32>().unwrap(),
            alone.to_vec2::<f32>().unwrap()
        );
    }
}

#[test]
fn equal_keys_average_the_values() {
    let mut rows = vec![[0f32; 18]; 4];
    for (i, row) in rows.iter_mut().enumerate() {
        row[12..].fill(i as f32);
    }
    let qkv = Tensor::from_vec(rows.concat(), (4, 18), &candle_core::Device::Cpu).unwrap();
    let out = attention(&qkv, None, &[], shape(&[0, 4], Positions::None)).unwrap();
    for value in out.flatten_all().unwrap().to_vec1::<f32>().unwrap() {
        assert!((value - 1.5).abs() < 1e-6);
    }
}

#[test]
fn what_the_positions_do_not_reach_is_an_error() {
    for (positions, dims) in kinds() {
        let refused = |tokens: usize, table: &Tensor| {
            let qkv = random(1, (tokens, 18));
            let shape = shape(&[0, tokens], positions.clone());
            attention(&qkv, None, &whole(table, 1), shape)
                .unwrap_err()
                .to_string()
        };
        let long = refused(6, &random(2, dims));
        assert!(long.contains("6 tokens exceeds 5"), "{long}");
        let small = refused(5, &random(2, (2, dims.1)));
        assert!(small.contains("lacks rows"), "{small}");
    }
}
