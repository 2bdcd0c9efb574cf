//! Makes an encoder of some of another's layers: a plain folder in the Hugging Face layout.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use serde_json::{Map, Value};

use super::install::{Sum, sums};
use super::{CONFIG, HubError, OPTIONAL, TOKENIZER};
use crate::encoder::{StoredTensors, WEIGHTS};
use crate::files::{self, MAX_JSON_BYTES};
use crate::lfs::refuse_pointer;
use crate::parse;

/// What the families call their number of layers in `config.json`.
const NUMBER_OF_LAYERS: [&str; 2] = ["num_hidden_layers", "n_layers"];
/// What the names of a layer's weights begin with, behind the family's prefix.
const LAYERS: [&str; 2] = ["encoder.layer.", "transformer.layer."];
/// Other parts of an encoder. What is neither is a head and stays behind.
const PARTS: [&str; 4] = ["embeddings", "encoder", "transformer", "pooler"];
/// What `config.json` says about a head.
const OF_THE_HEAD: [&str; 6] = [
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "kdlora",
];

/// That the encoder in `source` has these layers.
pub(super) fn check(source: &Path, layers: &[usize]) -> Result<(), HubError> {
    let path = source.join(CONFIG);
    let bytes = files::read(&path, MAX_JSON_BYTES).map_err(HubError::io("read", &path))?;
    config(source, &bytes, layers).map(drop)
}

/// Writes the encoder with `layers` of the one in `source` into the folder `target`.
///
/// A source whose sums are others afterwards was changed meanwhile.
pub(super) fn make(
    source: &Path,
    sums_of_source: &BTreeMap<String, Sum>,
    layers: &[usize],
    target: &Path,
) -> Result<(), HubError> {
    let read = |name: &str| {
        let path = source.join(name);
        files::read(&path, u64::MAX).map_err(HubError::io("read", &path))
    };
    let write = |name: &str, bytes: &[u8]| {
        let path = target.join(name);
        fs::write(&path, bytes).map_err(HubError::io("write", &path))
    };
    let config = config(source, &read(CONFIG)?, layers)?;
    write(CONFIG, config.as_bytes())?;
    for name in [TOKENIZER].into_iter().chain(OPTIONAL) {
        if sums_of_source.contains_key(name) {
            write(name, &read(name)?)?;
        }
    }
    let weights = target.join(WEIGHTS);
    write_weights(source, layers, &weights)?;
    if sums(source)? != *sums_of_source {
        return Err(HubError::Changed(source.to_owned()));
    }
    // The crate that writes them lets nobody else read them.
    fs::metadata(target.join(CONFIG))
        .and_then(|like| fs::set_permissions(&weights, like.permissions()))
        .map_err(HubError::io("set the permissions of", &weights))
}

/// `config.json` of the encoder without a head.
fn config(source: &Path, bytes: &[u8], layers: &[usize]) -> Result<String, HubError> {
    let bad = |what: String| HubError::BadEncoder {
        path: source.join(CONFIG),
        what,
    };
    refuse_pointer(&source.join(CONFIG), bytes)?;
    let mut config: Map<String, Value> =
        parse::json(bytes).map_err(|error| bad(error.to_string()))?;
    let mut number = None;
    for field in NUMBER_OF_LAYERS {
        if let Some(value) = config.get_mut(field) {
            number = value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok());
            *value = layers.len().into();
        }
    }
    let Some(number) = number else {
        return Err(bad("it does not say how many layers there are".to_owned()));
    };
    if let Some(layer) = layers.iter().find(|layer| **layer >= number) {
        return Err(HubError::NoSuchLayer {
            of: source.display().to_string(),
            layer: *layer,
            layers: number,
        });
    }
    for field in OF_THE_HEAD {
        config.remove(field);
    }
    if let Some(Value::Array(names)) = config.get_mut("architectures") {
        for name in names {
            // BertForSequenceClassification is a BertModel with a head.
            if let Some((family, _)) = name.as_str().and_then(|name| name.split_once("For")) {
                *name = format!("{family}Model").into();
            }
        }
    }
    let text = serde_json::to_string_pretty(&config).map_err(|error| bad(error.to_string()))?;
    Ok(text + "\n")
}

fn write_weights(source: &Path, layers: &[usize], target: &Path) -> Result<(), HubError> {
    let bad = |what: String| HubError::BadEncoder {
        path: source.to_owned(),
        what,
    };
    let stored = StoredTensors::open(source)?;
    let names: Vec<&str> = stored.names().collect();
    let prefix = prefix(&names);
    let taken = names.iter().filter_map(|name| {
        let renamed = renamed(name.strip_prefix(&prefix)?, layers)?;
        Some(stored.raw(name).map(|tensor| (renamed, tensor)))
    });
    let tensors = taken.collect::<Result<Vec<_>, _>>()?;
    for (place, layer) in layers.iter().enumerate() {
        let has = |(name, _): &(String, _)| number(name).is_some_and(|(_, at, _)| at == place);
        if !tensors.iter().any(has) {
            return Err(bad(format!("it has no weights of layer {layer}")));
        }
    }
    let views = tensors.iter().map(|(name, tensor)| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?;
        Ok((name, view))
    });
    let views: Result<Vec<_>, safetensors::SafeTensorError> = views.collect();
    views
        .and_then(|views| safetensors::serialize_to_file(views, stored.header().cloned(), target))
        .map_err(|error| bad(error.to_string()))
}

/// What stands before the encoder's own names, in a model that has a head beside it: `bert.`.
fn prefix(names: &[&str]) -> String {
    let before = |name: &&str| {
        let at = LAYERS.into_iter().find_map(|layers| name.find(layers))?;
        Some(name[..at].to_owned())
    };
    names.iter().find_map(before).unwrap_or_default()
}

/// The name of a weight in the encoder that is made; `None` if it stays behind.
fn renamed(name: &str, layers: &[usize]) -> Option<String> {
    if let Some((before, layer, rest)) = number(name) {
        let place = layers.iter().position(|chosen| *chosen == layer)?;
        return Some(format!("{before}{place}{rest}"));
    }
    let part = name.split('.').next().unwrap_or_default();
    // Old checkpoints store the numbers from 0 up.
    (PARTS.contains(&part) && !name.ends_with("position_ids")).then(|| name.to_owned())
}

/// A layer's weight: what stands before its number, the number, what stands behind it.
fn number(name: &str) -> Option<(&str, usize, &str)> {
    let before = LAYERS.into_iter().find(|layers| name.starts_with(layers))?;
    let rest = &name[before.len()..];
    let dot = rest.find('.')?;
    Some((before, rest[..dot].parse().ok()?, &rest[dot..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_numbered_anew_and_everything_else_of_the_encoder_stays() {
        let layers = [4, 0];
        for (name, expected) in [
            (
                "encoder.layer.0.output.dense.weight",
                Some("encoder.layer.1.output.dense.weight"),
            ),
            (
                "encoder.layer.4.output.dense.bias",
                Some("encoder.layer.0.output.dense.bias"),
            ),
            ("encoder.layer.14.output.dense.bias", None),
            ("encoder.layer.1.output.dense.weight", None),
            (
                "transformer.layer.4.ffn.lin1.weight",
                Some("transformer.layer.0.ffn.lin1.weight"),
            ),
            (
                "encoder.relative_attention_bias.weight",
                Some("encoder.relative_attention_bias.weight"),
            ),
            (
                "encoder.rel_embeddings.weight",
                Some("encoder.rel_embeddings.weight"),
            ),
            ("encoder.conv.conv.weight", Some("encoder.conv.conv.weight")),
            ("encoder.LayerNorm.weight", Some("encoder.LayerNorm.weight")),
            (
                "embeddings.LayerNorm.gamma",
                Some("embeddings.LayerNorm.gamma"),
            ),
            ("embeddings.position_ids", None),
            ("pooler.dense.weight", Some("pooler.dense.weight")),
            ("classifier.weight", None),
            ("cls.predictions.bias", None),
        ] {
            assert_eq!(renamed(name, &layers).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn the_prefix_is_the_family_s() {
        let names = [
            "classifier.bias",
            "bert.embeddings.x",
            "bert.encoder.layer.3.x",
        ];
        assert_eq!(prefix(&names), "bert.");
        assert_eq!(prefix(&["embeddings.x", "transformer.layer.0.x"]), "");
    }
}
