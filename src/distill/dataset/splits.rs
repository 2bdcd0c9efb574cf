//! Keeping splits apart, and cutting those that are missing from the training rows.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::error::DataError;
use super::{CUT_SHARE, Label, MAX_CUT, Row, Split};
use crate::distill::rng::CounterRng;
use crate::text::Input;

/// Streams of the generator, apart from those of training.
const STREAM: u64 = 0x5b11_7000;
/// Strata that the targets of a regression are sorted into.
const STRATA_OF_TARGETS: usize = 10;

/// Removes from `rows` what also stands in `later`. Gives the number of removed rows.
pub(super) fn remove_overlap(rows: &mut Vec<Row>, later: &[Row]) -> usize {
    let inputs: HashSet<&Input> = later.iter().map(|row| &row.input).collect();
    let before = rows.len();
    rows.retain(|row| !inputs.contains(&row.input));
    before - rows.len()
}

/// Rows whose input stands in an earlier row too.
pub(super) fn count_duplicates(rows: &[Row]) -> usize {
    let inputs: HashSet<&Input> = rows.iter().map(|row| &row.input).collect();
    rows.len() - inputs.len()
}

/// Different inputs that occur with different labels.
pub(super) fn count_conflicts<'a>(rows: impl Iterator<Item = &'a Row>) -> usize {
    let mut first: HashMap<&Input, &Label> = HashMap::new();
    let mut conflicting = HashSet::new();
    for row in rows {
        if let Some(label) = &row.label
            && *first.entry(&row.input).or_insert(label) != label
        {
            conflicting.insert(&row.input);
        }
    }
    conflicting.len()
}

/// Takes a share of [`CUT_SHARE`], at most [`MAX_CUT`] rows, out of `train` for each of `missing`.
/// Every stratum (class, or range of targets) gives its share, at least one text if it has a
/// text for each split. Rows with the same input stay together. Labelled rows only, if there are any.
pub(super) fn cut(
    train: &mut Vec<Row>,
    missing: &[Split],
    seed: u64,
) -> Result<Vec<Vec<Row>>, DataError> {
    let groups = group(train);
    let labelled = train.iter().any(|row| row.label.is_some());
    let strata = stratify(train, &groups, labelled);
    let eligible: usize = strata.values().flatten().map(|&g| groups[g].len()).sum();
    let share = CUT_SHARE.min(MAX_CUT as f64 / eligible.max(1) as f64);

    // The split that each row goes to, as an index into `missing`.
    let mut goes_to: Vec<Option<usize>> = vec![None; train.len()];
    for (stratum, mut members) in strata {
        CounterRng::new(seed, STREAM + stratum as u64).shuffle(&mut members);
        let rows: usize = members.iter().map(|&g| groups[g].len()).sum();
        let mut quota = (rows as f64 * share).round() as usize;
        if members.len() > missing.len() {
            quota = quota.max(1);
        }
        let mut members = members.into_iter();
        for split in 0..missing.len() {
            let mut taken = 0;
            while taken < quota
                && let Some(g) = members.next()
            {
                groups[g].iter().for_each(|&row| goes_to[row] = Some(split));
                taken += groups[g].len();
            }
        }
    }

    let mut parts = vec![Vec::new(); missing.len()];
    let (rows, texts) = (train.len(), groups.len());
    let mut kept = Vec::with_capacity(train.len());
    for (row, split) in std::mem::take(train).into_iter().zip(goes_to) {
        match split {
            Some(split) => parts[split].push(row),
            None => kept.push(row),
        }
    }
    *train = kept;
    match parts.iter().position(Vec::is_empty) {
        Some(split) => Err(DataError::TooFewToCut {
            split: missing[split],
            rows,
            texts,
        }),
        None => Ok(parts),
    }
}

/// Indexes of the rows of each input, in order of first appearance.
fn group(rows: &[Row]) -> Vec<Vec<usize>> {
    let mut places: HashMap<&Input, usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let place = *places.entry(&row.input).or_insert(groups.len());
        match groups.get_mut(place) {
            Some(group) => group.push(i),
            None => groups.push(vec![i]),
        }
    }
    groups
}

/// Indexes of the groups of each stratum. A group belongs where its first label puts it.
fn stratify(rows: &[Row], groups: &[Vec<usize>], labelled: bool) -> BTreeMap<usize, Vec<usize>> {
    let mut strata: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    if !labelled {
        strata.insert(0, (0..groups.len()).collect());
        return strata;
    }
    let mut targets = Vec::new();
    let frequency = label_frequency(rows);
    for (g, group) in groups.iter().enumerate() {
        let Some(label) = group.iter().find_map(|&row| rows[row].label.as_ref()) else {
            continue;
        };
        match label {
            Label::Class(class) => strata.entry(*class + 1).or_default().push(g),
            // The rarest label of a row decides, for common ones are spread anyway.
            Label::Labels(labels) => {
                let rarest = labels.iter().min_by_key(|label| frequency.get(label));
                strata
                    .entry(rarest.map_or(0, |label| label + 1))
                    .or_default()
                    .push(g);
            }
            Label::Value(value) => targets.push((*value, g)),
        }
    }
    targets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n = targets.len();
    let count = STRATA_OF_TARGETS.min(n / 10).max(1);
    for (rank, (_, g)) in targets.into_iter().enumerate() {
        strata.entry(rank * count / n).or_default().push(g);
    }
    strata
}

fn label_frequency(rows: &[Row]) -> HashMap<usize, usize> {
    let mut frequency = HashMap::new();
    for row in rows {
        if let Some(Label::Labels(labels)) = &row.label {
            for &label in labels {
                *frequency.entry(label).or_insert(0) += 1;
            }
        }
    }
    frequency
}
