//! The golden files, and logits beside them.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Device;
use kdlora::adapter::{AdapterFolder, Classifier};
use kdlora::encoder::{Encoder, EncoderConfig, Family, Placement};
use kdlora::text::{PackedBatch, Sequence};
use serde::Deserialize;

use crate::common::golden;

#[derive(Deserialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) model: String,
    pub(crate) adapter: Option<String>,
    pub(crate) sequences: Vec<GoldenSequence>,
}

#[derive(Deserialize)]
pub(crate) struct GoldenSequence {
    pub(crate) ids: Vec<u32>,
    pub(crate) type_ids: Vec<u32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) padded_logits: Vec<f32>,
}

impl Case {
    pub(crate) fn all() -> Vec<Self> {
        let text = std::fs::read_to_string(golden("cases.json")).unwrap();
        let cases: Vec<Self> = serde_json::from_str(&text).unwrap();
        assert!(cases.len() >= 10);
        cases
    }

    /// The cases of a family's models and adapters.
    pub(crate) fn of(model_type: &str) -> Vec<Self> {
        let is_of = |case: &Self| case.family().model_type() == model_type;
        let cases: Vec<Self> = Self::all().into_iter().filter(is_of).collect();
        assert!(!cases.is_empty(), "no golden files of {model_type}");
        cases
    }

    pub(crate) fn family(&self) -> Family {
        EncoderConfig::read(&self.model_folder()).unwrap().family
    }

    pub(crate) fn named(name: &str) -> Self {
        Self::all()
            .into_iter()
            .find(|case| case.name == name)
            .unwrap()
    }

    pub(crate) fn model_folder(&self) -> PathBuf {
        golden("models").join(&self.model)
    }

    pub(crate) fn adapter(&self) -> Option<AdapterFolder> {
        let dir = golden("adapters").join(self.adapter.as_ref()?);
        Some(AdapterFolder::read(&dir).unwrap())
    }

    pub(crate) fn classifier(&self) -> Classifier {
        let dir = self.model_folder();
        match self.adapter() {
            None => Classifier::load(&dir, &Placement::default()).unwrap(),
            Some(adapter) => {
                let encoder = Encoder::load(&dir, &Device::Cpu).unwrap();
                Classifier::from_adapter(Arc::new(encoder), &adapter).unwrap()
            }
        }
    }

    pub(crate) fn sequences(&self) -> Vec<Sequence> {
        self.sequences
            .iter()
            .map(|golden| Sequence {
                ids: golden.ids.clone(),
                type_ids: golden.type_ids.clone(),
                truncated: false,
            })
            .collect()
    }

    pub(crate) fn batch(&self) -> PackedBatch {
        PackedBatch::new(&self.sequences())
    }

    /// The batch of a golden training step: all but the last sequence.
    pub(crate) fn training_batch(&self) -> PackedBatch {
        let mut sequences = self.sequences();
        sequences.pop();
        PackedBatch::new(&sequences)
    }
}

pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let difference = (found - expected).abs();
        assert!(
            difference <= tolerance,
            "{what}: {found}, expected {expected}"
        );
    }
}

/// Mean distance to the golden logits, by their mean size. The models are random and a few values
/// wide, so that roundings hardly cancel out: real tasks lose far less.
pub(crate) fn relative_error(rows: &[Vec<f32>], case: &Case) -> f32 {
    let golden = case.sequences.iter().flat_map(|golden| &golden.logits);
    let found = rows.iter().flatten();
    let error: f32 = found.zip(golden.clone()).map(|(a, b)| (a - b).abs()).sum();
    error / golden.map(|x| x.abs()).sum::<f32>()
}

pub(crate) fn logits_are_the_golden_ones(model_type: &str) {
    compare(
        Case::of(model_type)
            .iter()
            .filter(|case| case.adapter.is_none()),
    );
}

pub(crate) fn adapters_answer_like_peft(model_type: &str) {
    compare(
        Case::of(model_type)
            .iter()
            .filter(|case| case.adapter.is_some()),
    );
}

fn compare<'a>(cases: impl Iterator<Item = &'a Case>) {
    let mut compared = 0;
    for case in cases {
        let classifier = case.classifier();
        for (i, (sequence, golden)) in case.sequences().iter().zip(&case.sequences).enumerate() {
            let rows = classifier.logits(&PackedBatch::new([sequence])).unwrap();
            let what = format!(
                "{}, sequence {i} of {} tokens",
                case.name,
                sequence.ids.len()
            );
            assert_close(&rows[0], &golden.logits, 1e-4, &what);
            assert_close(&rows[0], &golden.padded_logits, 1e-4, &what);
            compared += 1;
        }
    }
    assert!(compared > 0);
}
