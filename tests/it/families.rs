//! What every family of encoders can do: a test for each cell of the table that
//! `tests/peft/families.py` prints.
//!
//! The golden files are what `transformers` and `peft` answer: see `tests/golden/make_golden.py`.

mod batches;
pub(crate) mod cases;
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
                crate::families::cases::logits_are_the_golden_ones($model_type);
            }

            #[test]
            fn gradients() {
                crate::families::gradients::gradients_are_the_golden_ones($model_type);
            }

            #[test]
            fn batch_independence() {
                crate::families::batches::a_sequence_answers_the_same_in_any_batch($model_type);
            }

            #[test]
            fn peft_in() {
                crate::families::cases::adapters_answer_like_peft($model_type);
            }

            #[test]
            fn peft_out() {
                crate::families::folders::an_adapter_answers_the_same_after_a_round($model_type);
            }

            #[test]
            fn merge() {
                crate::families::folders::a_merged_adapter_is_a_classifier_of_its_own($model_type);
            }

            #[test]
            fn packed() {
                crate::families::packed::a_packed_encoder_answers_the_same($model_type);
            }

            #[tokio::test]
            async fn serve() {
                crate::families::served::http_answers_are_the_golden_ones($model_type).await;
            }

            #[test]
            fn distil() {
                crate::families::distilled::a_teacher_is_distilled($model_type);
            }
        }
    };
}

family!(bert, "bert");
family!(roberta, "roberta");
family!(distilbert, "distilbert");
family!(mpnet, "mpnet");
family!(deberta_v2, "deberta-v2");
