//! Packed batches: no sequence sees another.

use candle_core::Device;
use kdlora::adapter::Classifier;
use kdlora::encoder::{Encoder, Segment};
use kdlora::text::{PackedBatch, Sequence};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::families::cases::{Case, assert_close};

/// Token ids that the golden models have.
const VOCABULARY: u32 = 60;

pub(crate) fn a_sequence_answers_the_same_in_any_batch(model_type: &str) {
    for case in Case::of(model_type) {
        let classifier = case.classifier();
        // The same batches in each run: what is measured are roundings.
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let batches = vec(sequence(&classifier), 1..7);
        TestRunner::new_with_rng(Config::with_cases(24), rng)
            .run(&batches, |sequences| {
                let packed = classifier.logits(&PackedBatch::new(&sequences)).unwrap();
                for (sequence, row) in sequences.iter().zip(&packed) {
                    let alone = classifier.logits(&PackedBatch::new([sequence])).unwrap();
                    // Of a number above 1 its f32 has no more to say than relative to it.
                    let scale = alone[0].iter().fold(1f32, |top, x| top.max(x.abs()));
                    let what = format!("{}, {sequence:?}", case.name);
                    assert_close(row, &alone[0], 1e-5 * scale, &what);
                }
                Ok(())
            })
            .unwrap();
    }
}

/// Any ids, from one token to as many as the encoder takes, in one segment or two.
fn sequence(classifier: &Classifier) -> impl Strategy<Value = Sequence> + use<> {
    let config = classifier.encoder.config();
    let (longest, segments) = (config.max_sequence_length(), config.type_vocab_size);
    let length = prop_oneof![1..6usize, 1..=longest];
    length.prop_flat_map(move |length| {
        let border = if segments == 2 {
            0..=length
        } else {
            length..=length
        };
        (vec(0..VOCABULARY, length), border).prop_map(|(ids, border)| Sequence {
            type_ids: (0..ids.len()).map(|i| u32::from(i >= border)).collect(),
            ids,
            truncated: false,
        })
    })
}

#[test]
fn tasks_in_one_batch_do_not_touch_each_other() {
    let first = Case::named("bert-pairs-qv");
    let second = Case::named("bert-pairs-pooler");
    let encoder = Encoder::load(&first.model_folder(), &Device::Cpu).unwrap();
    let first_weights = first.adapter().unwrap().bind(&encoder).unwrap();
    let second_weights = second.adapter().unwrap().bind(&encoder).unwrap();
    let count = first.sequences.len();
    let sequences = [first.sequences(), second.sequences(), first.sequences()].concat();
    let segment = |part: usize, weights| Segment {
        sequences: part * count..(part + 1) * count,
        weights,
    };
    let segments = [
        segment(0, &first_weights),
        segment(1, &second_weights),
        segment(2, &first_weights),
    ];
    let rows = encoder
        .logits(&PackedBatch::new(&sequences), &segments)
        .unwrap();
    let golden = [&first, &second, &first];
    let golden = golden.iter().flat_map(|case| &case.sequences);
    for (row, golden) in rows.iter().zip(golden) {
        assert_close(row, &golden.logits, 1e-4, "mixed batch");
    }
}
