//! What every family of encoders can do: a test for each cell of the table that
//! `tests/peft/families.py` prints.
//!
//! The golden files are what `transformers` and `peft` answer: see `tests/golden/make_golden.py`.

#[path = "../common/mod.rs"]
mod common;

mod batches;
mod cases;
mod distilled;
mod folders;
mod gradients;
mod packed;
mod refused;
mod served;

/// Tests of one family, given its `model_type`.
macro_rules! family {
    ($module:ident, $model_type:literal) => {
        mod $module {
            #[test]
            fn logits() {
                crate::cases::logits_are_the_golden_ones($model_type);
            }

            #[test]
            fn gradients() {
                crate::gradients::gradients_are_the_golden_ones($model_type);
            }

            #[test]
            fn batch_independence() {
                crate::batches::a_sequence_answers_the_same_in_any_batch($model_type);
            }

            #[test]
            fn peft_in() {
                crate::cases::adapters_answer_like_peft($model_type);
            }

            #[test]
            fn peft_out() {
                crate::folders::an_adapter_answers_the_same_after_a_round($model_type);
            }

            #[test]
            fn merge() {
                crate::folders::a_merged_adapter_is_a_classifier_of_its_own($model_type);
            }

            #[test]
            fn packed() {
                crate::packed::a_packed_encoder_answers_the_same($model_type);
            }

            #[tokio::test]
            async fn serve() {
                crate::served::http_answers_are_the_golden_ones($model_type).await;
            }

            #[test]
            fn distil() {
                crate::distilled::a_teacher_is_distilled($model_type);
            }
        }
    };
}

family!(bert, "bert");
family!(roberta, "roberta");
family!(distilbert, "distilbert");
family!(mpnet, "mpnet");
family!(deberta_v2, "deberta-v2");
