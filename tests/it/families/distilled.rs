//! A pass with a student and a teacher of the family, by the program itself.

use std::process::Command;

use kdlora::adapter::AdapterFolder;
use serde_json::{Value, json};

use crate::common::{Install, letters_or_digits, program};
use crate::families::cases::Case;

pub(crate) fn a_teacher_is_distilled(model_type: &str) {
    let cases = Case::of(model_type);
    let model = cases.iter().find(|case| case.adapter.is_none()).unwrap();
    let install = Install::of(&model.name);
    let spec = install.state().with_extension("json");
    let request = json!({
        "task": "kind",
        "data": {"train": {"rows": letters_or_digits(96)}},
        "teacher": {
            "model": install.student(),
            "finetune": {"mode": "full", "epochs": 6, "learning_rate": 0.003},
        },
        "lora": {"r": 4, "alpha": 8, "targets": ["all-linear"]},
        "training": {"epochs": 8, "batch_size": 8, "learning_rate": 0.01, "max_length": 16},
    });
    std::fs::write(&spec, request.to_string()).unwrap();
    let out = install.state().with_extension("out");
    let output = Command::new(program())
        .args(["--log", "warn", "distill", "--threads", "1", "--spec"])
        .arg(&spec)
        .arg("--student")
        .arg(install.student())
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report = std::fs::read(out.join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let score = |of: &str| {
        let score = &report[of]["score"]["value"];
        score.as_f64().unwrap_or_else(|| panic!("{report}"))
    };
    assert!(score("teacher") > 0.85, "{report}");
    assert!(score("student") > 0.85, "{report}");
    let encoder = kdlora::encoder::Encoder::load(&install.student(), &candle_core::Device::Cpu);
    let adapter = AdapterFolder::read(&out).unwrap();
    adapter.bind(&encoder.unwrap()).unwrap();
}
