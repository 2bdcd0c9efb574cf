//! What can be said of launches without running them.

use super::*;
use crate::ops::Activation;

fn update(rows: std::ops::Range<usize>) -> Update {
    Update {
        rows,
        a: Ptr(16),
        b: Ptr(32),
        gain: None,
        shift: None,
        scale: 1.0,
        rank: 8,
        column: 0,
        width: 4,
    }
}

#[test]
fn nothing_to_do_is_not_launched() {
    let (x, y) = (Ptr(16), Ptr(32));
    assert!(shrink(Scalar::Bf16, x, 8, &[update(3..3)], y).is_empty());
    let idle = expand(Scalar::F32, y, 9, 4, None, &[], x, Activation::None);
    assert!(idle.is_empty());
    let no_rows = expand(Scalar::F32, y, 0, 4, Some(x), &[], x, Activation::Gelu);
    assert!(no_rows.is_empty());
    assert!(norm(Scalar::F16, x, None, None, x, y, 0, 8, 1e-5).is_none());
    assert!(activation(Scalar::F16, Activation::Gelu, x, y, 0).is_none());
}

#[test]
fn adapters_share_launches() {
    let (x, y) = (Ptr(16), Ptr(32));
    let updates: Vec<Update> = (0..100).map(|i| update(5 * i..5 * i + 5)).collect();
    assert_eq!(shrink_values(&updates), 500 * 8);
    assert_eq!(shrink(Scalar::Bf16, x, 8, &updates, y).len(), 2);
    let expanded = expand(
        Scalar::Bf16,
        y,
        500,
        4,
        Some(x),
        &updates,
        x,
        Activation::Gelu,
    );
    assert_eq!(expanded.len(), 2);
}
