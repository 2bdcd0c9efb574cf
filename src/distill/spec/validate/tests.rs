use serde_json::{Value, json};

use super::*;

fn spec(patch: &[(&str, Value)]) -> DistillSpec {
    let mut spec = json!({
        "task": "movie-sentiment",
        "data": {"train": {"rows": [{"text": "a", "label": "x"}]}},
        "teacher": {"model": "mpnet-base", "finetune": {"mode": "lora", "epochs": 2}},
        "lora": {},
        "training": {},
        "gate": {},
    });
    for (pointer, value) in patch {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value.clone();
    }
    serde_json::from_value(spec).unwrap()
}

#[test]
fn the_defaults_are_valid() {
    assert_eq!(spec(&[]).validate(), Ok(()));
}

#[test]
fn a_teacher_over_http_is_one_that_a_pass_may_ask() {
    let with = |url: &str, more: Value| {
        let mut teacher = json!({"http": {"url": url}});
        for (field, value) in more.as_object().unwrap() {
            teacher[field] = value.clone();
        }
        let checked = spec(&[("/teacher", teacher)]).validate();
        checked.map_err(|error| error.to_string())
    };
    for good in [
        "http://127.0.0.1:8081/predict",
        "https://teacher.example/v1",
        "http://[::1]:80/predict",
        "http://10.0.0.7/predict",
    ] {
        assert_eq!(with(good, json!({})), Ok(()), "{good}");
    }
    for (bad, part) in [
        ("file:///etc/passwd", "whole address"),
        ("ftp://host/predict", "http:// or https://"),
        ("/predict", "http:// or https://"),
        ("http://name:secret@host/predict", "no user name"),
        ("http://169.254.169.254/latest/meta-data", "link-local"),
        ("http://[fe80::1]/predict", "link-local"),
        ("http://[::ffff:169.254.169.254]/", "link-local"),
        ("http://0.0.0.0/", "unspecified"),
        ("http://2130706433/", "four decimal numbers"),
        ("not an address", "whole address"),
    ] {
        let error = with(bad, json!({})).unwrap_err();
        assert!(error.contains(part), "{bad}: {error}");
    }
    let both = with("http://host/predict", json!({"model": "mpnet-base"}));
    assert!(both.unwrap_err().contains("without model"));
    let missing = spec(&[("/teacher", json!({}))]).validate().unwrap_err();
    assert!(missing.to_string().contains("teacher.model"), "{missing}");
}

#[test]
fn bounds_belong_to_the_range() {
    for (pointer, value) in [
        ("/lora/r", json!(256)),
        ("/lora/dropout", json!(0.0)),
        ("/training/epochs", json!(100)),
        ("/training/batch_size", json!(1)),
        ("/training/alpha", json!(1)),
        ("/training/alpha", json!(0)),
        ("/training/max_length", json!(512)),
        ("/training/warmup_ratio", json!(0)),
        ("/gate/keep", json!(0)),
    ] {
        assert_eq!(spec(&[(pointer, value)]).validate(), Ok(()), "{pointer}");
    }
}

#[test]
fn each_impossible_value_is_named_with_what_is_allowed() {
    for (pointer, value, message) in [
        (
            "/task",
            json!("Übung"),
            "task is \"Übung\" but must be 1 to 64 lower-case",
        ),
        ("/task", json!("../x"), "task is \"../x\" but"),
        ("/task", json!("-x"), "task is \"-x\" but"),
        ("/task", json!(""), "task is \"\" but"),
        (
            "/data/train",
            json!({"rows": []}),
            "data.train.rows is empty but must hold",
        ),
        (
            "/data/test",
            json!({"path": ""}),
            "data.test.path is empty but must name a file",
        ),
        (
            "/data/labels",
            json!([]),
            "data.labels is a list of 0 but must hold 1 to 1000",
        ),
        (
            "/data/labels",
            json!(["a", "a"]),
            "data.labels[1] is \"a\" but must differ",
        ),
        (
            "/teacher/model",
            json!(" "),
            "teacher.model is \" \" but must be 1 to",
        ),
        (
            "/teacher/finetune/epochs",
            json!(0),
            "teacher.finetune.epochs is 0 but must be 1 to 100",
        ),
        (
            "/teacher/finetune/learning_rate",
            json!(0),
            "teacher.finetune.learning_rate is 0 but must be greater than 0 and less than 1",
        ),
        ("/lora/r", json!(0), "lora.r is 0 but must be 1 to 256"),
        ("/lora/r", json!(257), "lora.r is 257 but must be 1 to 256"),
        (
            "/lora/alpha",
            json!(0),
            "lora.alpha is 0 but must be greater than 0 and at most 4096",
        ),
        (
            "/lora/dropout",
            json!(1),
            "lora.dropout is 1 but must be at least 0 and less than 1",
        ),
        (
            "/lora/targets",
            json!([]),
            "lora.targets is a list of 0 but",
        ),
        ("/lora/targets", json!([""]), "lora.targets[0] is \"\" but"),
        (
            "/training/epochs",
            json!(101),
            "training.epochs is 101 but must be 1 to 100",
        ),
        (
            "/training/batch_size",
            json!(0),
            "training.batch_size is 0 but must be 1 to 1024",
        ),
        (
            "/training/learning_rate",
            json!(1),
            "training.learning_rate is 1 but must be greater than 0 and less than 1",
        ),
        (
            "/training/learning_rate",
            json!(-0.1),
            "training.learning_rate is -0.1 but",
        ),
        (
            "/training/temperature",
            json!(0),
            "training.temperature is 0 but",
        ),
        (
            "/training/label_repeats",
            json!(0),
            "training.label_repeats is 0 but must be 1 to 100",
        ),
        (
            "/training/alpha",
            json!(1.1),
            "training.alpha is 1.1 but must be 0 to 1",
        ),
        (
            "/student",
            json!({"model": "mpnet-base", "layers": []}),
            "student.layers is \"[]\" but must hold",
        ),
        (
            "/student",
            json!({"model": "mpnet-base", "layers": [0, 4, 0]}),
            "student.layers is \"[0, 4, 0]\" but must hold 1 to 256 numbers, each once",
        ),
        (
            "/student",
            json!({"model": ""}),
            "student.model is \"\" but",
        ),
        (
            "/training/max_length",
            json!(7),
            "training.max_length is 7 but must be 8 to 512",
        ),
        (
            "/training/warmup_ratio",
            json!(1),
            "training.warmup_ratio is 1 but",
        ),
        (
            "/training/weight_decay",
            json!(-1),
            "training.weight_decay is -1 but",
        ),
        (
            "/training/max_grad_norm",
            json!(0),
            "training.max_grad_norm is 0 but",
        ),
        (
            "/gate/keep",
            json!(1.6),
            "gate.keep is 1.6 but must be 0 to 1.5",
        ),
    ] {
        let error = spec(&[(pointer, value)]).validate().unwrap_err();
        assert_eq!(error.fields.len(), 1, "{error}");
        let text = error.to_string();
        assert!(text.starts_with(message), "{text}");
    }
}

#[test]
fn numbers_that_are_none_are_refused() {
    let mut spec = spec(&[]);
    spec.training.temperature = f64::NAN;
    spec.training.alpha = f64::NAN;
    spec.lora.dropout = f64::NAN;
    assert_eq!(spec.validate().unwrap_err().fields.len(), 3);
}

#[test]
fn all_that_is_wrong_is_named_at_once() {
    let error = spec(&[("/lora/r", json!(0)), ("/training/epochs", json!(0))])
        .validate()
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "lora.r is 0 but must be 1 to 256; training.epochs is 0 but must be 1 to 100"
    );
}

#[test]
fn the_echo_does_not_tell_where_files_lie() {
    let echo = spec(&[
        ("/data/test", json!({"path": "/srv/state/jobs/7/test.csv"})),
        (
            "/teacher",
            json!({"model": "/srv", "adapter": "/srv/mood/teacher"}),
        ),
    ])
    .without_rows();
    assert_eq!(echo["data"]["test"]["path"], "7/test.csv");
    assert_eq!(
        echo["teacher"],
        json!({"model": "srv", "adapter": "mood/teacher"})
    );
}

#[test]
fn the_echo_of_a_request_counts_inline_rows() {
    let echo = spec(&[("/data/test", json!({"path": "test.csv"}))]).without_rows();
    assert_eq!(
        echo["data"],
        json!({"train": {"rows": 1}, "test": {"path": "test.csv"}})
    );
    assert_eq!(echo["training"]["epochs"], json!(4));
}

#[test]
fn a_column_serves_one_field() {
    let columns = |columns: serde_json::Value, preset: Option<&str>| {
        let mut spec = spec(&[("/data/columns", columns)]);
        spec.data.preset = preset.map(|name| crate::parse::value(json!(name)).unwrap());
        spec.validate().map_err(|error| error.to_string())
    };
    for (given, preset, shared) in [
        (
            json!({"text": "text", "text_pair": "label"}),
            None,
            ["text_pair", "label"],
        ),
        (json!({"text": "label"}), None, ["text", "label"]),
        (json!({"label": "text"}), None, ["text", "label"]),
        (
            json!({"label": "x", "teacher_logits": "x"}),
            None,
            ["label", "teacher_logits"],
        ),
        (
            json!({"text": "x", "text_pair": "x"}),
            None,
            ["text", "text_pair"],
        ),
        (
            json!({"text_pair": "sentence1"}),
            Some("mrpc"),
            ["text", "text_pair"],
        ),
        (json!({"text": "Quality"}), Some("mrpc"), ["text", "label"]),
    ] {
        let error = columns(given.clone(), preset).unwrap_err();
        let [first, second] = shared;
        let expected = format!("for both {first} and {second} but must give each field a column");
        assert!(
            error.starts_with("data.columns is \"") && error.contains(&expected),
            "{given}: {error}"
        );
    }
    for (given, preset) in [
        (json!({}), None),
        (json!({"text": "label", "label": "text"}), None),
        (
            json!({"text": "body", "text_pair": "title", "label": "stars"}),
            None,
        ),
        (
            json!({"text": "sentence2", "text_pair": "sentence1"}),
            Some("rte"),
        ),
    ] {
        assert_eq!(columns(given.clone(), preset), Ok(()), "{given}");
    }
}

#[test]
fn unknown_fields_are_refused() {
    for at in ["training", "lora", "gate", "data", "teacher"] {
        let mut spec = serde_json::to_value(spec(&[])).unwrap();
        spec[at]["epoch"] = json!(1);
        let error = serde_json::from_value::<DistillSpec>(spec).unwrap_err();
        assert!(
            error.to_string().contains("unknown field `epoch`"),
            "{error}"
        );
    }
}
