//! The texts of the benchmarks: those of the test split of a ready-made task.

use std::fs;

use kdlora::text::{Input, Sequence, Tokenizer};

pub(crate) const TASK: &str = "movie-sentiment";

/// All of them, in the file's order.
pub(crate) fn sequences(tokenizer: &Tokenizer) -> Vec<Sequence> {
    let rows = fs::read_to_string(format!("data/{TASK}/test.jsonl")).expect("the data set");
    rows.lines()
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).expect("a row");
            let input = Input {
                text: row["text"].as_str().expect("a text").to_owned(),
                text_pair: None,
            };
            tokenizer.encode(&input, 128, None).expect("a short text")
        })
        .collect()
}
