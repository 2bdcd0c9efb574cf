//! Weights in one file and in shards, and what can be wrong with either.

use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use std::fs;

use super::*;
use crate::encoder::Encoder;

fn golden(model: &str) -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    models.join(model)
}

/// Copies the files of a model folder into `to`, its weights in `count` shards and an index.
pub(crate) fn copy_in_shards(from: &Path, to: &Path, count: usize) {
    let stored = StoredTensors::open(from).unwrap();
    let names: Vec<&str> = stored.names().collect();
    let mut index = Map::new();
    for number in 1..=count {
        let shard = format!("model-{number:05}-of-{count:05}.safetensors");
        let of_shard = names.iter().skip(number - 1).step_by(count);
        let tensors: Vec<_> = of_shard
            .map(|name| (*name, stored.raw(name).unwrap()))
            .collect();
        let views = tensors.iter().map(|(name, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (*name, view.unwrap())
        });
        let header = stored.header().cloned();
        safetensors::serialize_to_file(views, header, &to.join(&shard)).unwrap();
        index.extend(
            tensors
                .iter()
                .map(|(name, _)| ((*name).to_owned(), shard.clone().into())),
        );
    }
    write_index(to, &index.into());
    for entry in fs::read_dir(from).unwrap() {
        let name = entry.unwrap().file_name();
        if name != WEIGHTS {
            fs::copy(from.join(&name), to.join(&name)).unwrap();
        }
    }
}

fn write_index(folder: &Path, weight_map: &Value) {
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    fs::write(folder.join(WEIGHTS_INDEX), index.to_string()).unwrap();
}

fn in_shards() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_in_shards(&golden("bert-pairs"), folder.path(), 3);
    folder
}

#[test]
fn shards_hold_what_one_file_holds() {
    for model in ["bert-pairs", "bert-half", "deberta-value"] {
        let folder = tempfile::tempdir().unwrap();
        copy_in_shards(&golden(model), folder.path(), 3);
        let whole = StoredTensors::open(&golden(model)).unwrap();
        let shards = StoredTensors::open(folder.path()).unwrap();
        assert!(whole.names().eq(shards.names()), "{model}");
        assert_eq!(whole.elements(), shards.elements());
        for name in whole.names() {
            assert_eq!(whole.raw(name).unwrap(), shards.raw(name).unwrap());
        }
        assert_eq!(weight_files(folder.path()).unwrap().len(), 4);
        Encoder::load(folder.path(), &Device::Cpu).unwrap();
    }
}

#[test]
fn one_file_wins_over_an_index() {
    let folder = in_shards();
    fs::copy(
        golden("bert-pairs").join(WEIGHTS),
        folder.path().join(WEIGHTS),
    )
    .unwrap();
    assert_eq!(
        weight_files(folder.path()).unwrap(),
        [folder.path().join(WEIGHTS)]
    );
}

/// The message of the error, which must name the index.
fn refused(folder: &Path) -> String {
    let message = StoredTensors::open(folder).unwrap_err().to_string();
    assert!(message.contains(WEIGHTS_INDEX), "{message}");
    message
}

#[test]
fn a_missing_shard_is_named() {
    let folder = in_shards();
    let shard = "model-00002-of-00003.safetensors";
    fs::remove_file(folder.path().join(shard)).unwrap();
    let message = refused(folder.path());
    assert!(
        message.contains(&format!("the shard {shard} is missing")),
        "{message}"
    );
}

#[test]
fn an_index_that_does_not_list_what_the_shards_hold_is_refused() {
    let folder = in_shards();
    let path = folder.path().join(WEIGHTS_INDEX);
    let index: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let changed = |change: fn(&mut Map<String, Value>)| {
        let mut map = index["weight_map"].as_object().unwrap().clone();
        change(&mut map);
        write_index(folder.path(), &map.into());
        refused(folder.path())
    };
    let message = changed(|map| drop(map.remove("classifier.weight")));
    assert!(
        message.contains("does not list the tensor classifier.weight"),
        "{message}"
    );
    let message = changed(|map| {
        let other = map["classifier.bias"].clone();
        map.insert("classifier.weight".into(), other);
    });
    assert!(
        message.contains("does not hold the tensor classifier.weight"),
        "{message}"
    );
    let message = changed(|map| {
        let shard = map["classifier.bias"].clone();
        map.insert("no.such.weight".into(), shard);
    });
    assert!(message.contains("the tensor no.such.weight"), "{message}");
}

#[test]
fn a_shard_lies_beside_its_index() {
    let folder = in_shards();
    let outside = folder.path().join("outside.safetensors");
    fs::copy(golden("bert-pairs").join(WEIGHTS), &outside).unwrap();
    let inner = folder.path().join("inner");
    fs::create_dir(&inner).unwrap();
    for name in [
        "../outside.safetensors",
        outside.to_str().unwrap(),
        "./../outside.safetensors",
        "inner/../../outside.safetensors",
        "..",
        "",
    ] {
        write_index(&inner, &json!({"classifier.weight": name}));
        let message = refused(&inner);
        assert!(message.contains(&format!("{name:?}")), "{message}");
    }
    for bad in [json!("x"), json!({"a": 1}), json!(null)] {
        write_index(&inner, &bad);
        refused(&inner);
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let folder = in_shards();
    let [one, two] = [1, 2].map(|n| {
        folder
            .path()
            .join(format!("model-0000{n}-of-00003.safetensors"))
    });
    fs::copy(one, two).unwrap();
    let message = StoredTensors::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("both hold the tensor"), "{message}");
}

#[test]
fn a_git_lfs_pointer_is_told_from_a_damaged_file() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n";
    for file in [WEIGHTS, WEIGHTS_INDEX, "model-00001-of-00003.safetensors"] {
        let folder = in_shards();
        fs::write(folder.path().join(file), pointer).unwrap();
        let message = StoredTensors::open(folder.path()).unwrap_err().to_string();
        assert!(
            message.contains(file) && message.contains("git lfs pull"),
            "{message}"
        );
    }
    let folder = in_shards();
    fs::write(folder.path().join("config.json"), pointer).unwrap();
    let error = Encoder::load(folder.path(), &Device::Cpu).err().unwrap();
    assert!(error.to_string().contains("git lfs pull"), "{error}");
}

#[test]
fn a_damaged_file_is_refused() {
    let bytes = fs::read(golden("bert-pairs").join(WEIGHTS)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(WEIGHTS);
    let mut longer = bytes.clone();
    longer.push(0);
    let cut = |length: usize| bytes[..length].to_vec();
    let no_header = vec![0xff; 100];
    for damaged in [
        cut(0),
        cut(4),
        cut(20),
        cut(bytes.len() - 1),
        longer,
        no_header,
    ] {
        fs::write(&path, &damaged).unwrap();
        StoredTensors::open(folder.path()).unwrap_err();
    }
}

#[test]
fn advice_for_pickles_keeps_the_classification_head() {
    for pickle in PICKLES {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(pickle), "").unwrap();
        let message = StoredTensors::open(folder.path()).unwrap_err().to_string();
        assert!(message.contains(pickle), "{message}");
        assert!(
            message.contains("AutoModelForSequenceClassification"),
            "{message}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let message = StoredTensors::open(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains("model.safetensors is missing")
            && message.contains("AutoModelForSequenceClassification"),
        "{message}"
    );
}

#[test]
fn weights_that_are_not_finite_are_named() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let folder = in_shards();
        let file = folder.path().join("model-00001-of-00003.safetensors");
        let name = {
            let shard = StoredTensors::of_file(file.clone()).unwrap();
            shard.names().next().unwrap().to_owned()
        };
        let mut bytes = fs::read(&file).unwrap();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&value.to_le_bytes());
        fs::write(&file, bytes).unwrap();
        let error = Encoder::load(folder.path(), &Device::Cpu).err().unwrap();
        let message = error.to_string();
        assert!(message.contains("not finite"), "{message} {name}");
    }
}
