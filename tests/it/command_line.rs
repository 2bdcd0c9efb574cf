//! What the program says of itself: help, completions, manual.

use std::process::Command;

use crate::common::program;

fn kdlora(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_kdlora"))
        .args(words)
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn every_shell_gets_completions_of_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = kdlora(&["completions", shell]);
        for word in ["serve", "distill", "adapter", "max-queue"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}

#[test]
fn bash_takes_its_completions() {
    let script = kdlora(&["completions", "bash"]);
    let check = "eval \"$1\" && COMP_WORDS=(kdlora ser) COMP_CWORD=1 && \
                 _kdlora kdlora ser kdlora && echo \"${COMPREPLY[*]}\"";
    let output = Command::new("bash")
        .args(["-c", check, "bash", &script])
        .output()
        .expect("bash starts");
    let completed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(completed.trim(), "serve", "{output:?}");
}

#[test]
fn there_is_a_manual_page_for_each_command() {
    let page = kdlora(&["man"]);
    assert!(page.contains(".TH kdlora 1"), "{page}");
    let folder = tempfile::tempdir().expect("a folder");
    kdlora(&["man", "--out", folder.path().to_str().expect("UTF-8")]);
    for name in ["kdlora.1", "kdlora-serve.1", "kdlora-adapter-import.1"] {
        let page = std::fs::read_to_string(folder.path().join(name)).expect(name);
        assert!(page.contains("SYNOPSIS"), "{name}");
    }
}

#[test]
fn an_empty_variable_is_refused_by_its_name() {
    for variable in [
        "KDLORA_BIND",
        "KDLORA_STUDENT",
        "KDLORA_STATE",
        "KDLORA_DEFAULT_TASK",
        "KDLORA_MAX_QUEUE",
        "KDLORA_LOG",
        "KDLORA_API_TOKENS",
        "KDLORA_ADMIN_TOKENS",
        "KDLORA_TEACHER_TOKEN",
    ] {
        let run = |words: &[&str]| {
            let mut command = Command::new(program());
            command.args(words).env(variable, "");
            command.output().expect("the program starts")
        };
        for words in [&["serve"][..], &["serve", "--bind", "127.0.0.1:0"]] {
            let output = run(words);
            assert_eq!(output.status.code(), Some(2), "{variable}");
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(
                error.contains(variable) && error.contains("empty"),
                "{error}"
            );
        }
        assert!(run(&["--help"]).status.success(), "{variable}");
    }
}

#[test]
fn help_shows_how_to_begin() {
    for (words, example) in [
        (&["--help"][..], "kdlora serve"),
        (&["serve", "--help"], "curl"),
        (&["distill", "--help"], "--spec pass.json"),
        (&["pull", "--help"], "kdlora pull minilm-l6"),
        (&["adapter", "--help"], "kdlora adapter inspect"),
    ] {
        let help = kdlora(words);
        let examples = help.split("Examples:").nth(1);
        assert!(
            examples.is_some_and(|text| text.contains(example)),
            "{words:?}: {help}"
        );
    }
}

#[test]
fn files_of_requests_and_settings_are_read_strictly() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    let path = file.to_str().expect("UTF-8");
    let out = folder.path().join("out");
    let out = ["--out", out.to_str().expect("UTF-8")];
    let distill = [&["distill", "--spec", path], &out[..]].concat();
    let compare = [&["compare", "--spec", path], &out[..]].concat();
    let serve = ["serve", "--config", path];
    for (arguments, text, expected) in [
        (&distill[..], "[]", "expected an object, got a list"),
        (
            &distill,
            r#"{"task": "a", "data": {"train": {"path": "a.csv"}, "columns": ["text", "label"]}}"#,
            "data.columns: expected an object, got a list",
        ),
        (
            &distill,
            r#"{"task": "a", "data": {"train": {"path": "a.csv"}}, "training": {"epochs": 1.5}}"#,
            "training.epochs: expected a whole number, got 1.5",
        ),
        (
            &distill,
            r#"{"task": "a", "task": "b"}"#,
            "duplicate field `task`",
        ),
        (
            &compare,
            r#"{"pass": ["a"]}"#,
            "pass: expected an object, got a list",
        ),
        (
            &serve,
            "max-queue = \"many\"",
            "max-queue: expected a whole number, got \"many\"",
        ),
        (
            &serve,
            "bind = [\"127.0.0.1\", 80]",
            "bind: expected socket address, got a list",
        ),
    ] {
        std::fs::write(&file, text).expect("a file");
        let output = Command::new(env!("CARGO_BIN_EXE_kdlora"))
            .args(arguments)
            .output()
            .expect("the program starts");
        assert!(!output.status.success(), "{text}");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains(expected), "{text}: {error}");
    }
}
