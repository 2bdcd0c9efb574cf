//! PEFT's names of tensors, as they have been over its versions, and the one form of each used here.

/// What PEFT puts before the names of the wrapped model.
pub(super) const PREFIX: &str = "base_model.model.";
pub(super) const LORA_A: &str = ".lora_A.weight";
pub(super) const LORA_B: &str = ".lora_B.weight";
/// Part of the name of LoRA matrices of an embedding table.
pub(super) const LORA_EMBEDDING: &str = ".lora_embedding_";
pub(super) const MAGNITUDE: &str = ".lora_magnitude_vector";

/// What a tensor of an adapter's file is called here.
#[derive(Debug, PartialEq)]
pub(super) enum Stored {
    /// Its name in the model without PEFT: `bert.pooler.dense.bias`, `….query.lora_A.weight`.
    As(String),
    /// A copy of what a trained module replaces. PEFT stores one by mistake (with `bias: "all"`)
    /// and has no use for it.
    Replaced,
    /// Not a name that PEFT gives.
    Unknown,
}

/// Takes away the prefix, the adapter's name (`default`) and the names of wrappers.
pub(super) fn read(name: &str) -> Stored {
    let Some(name) = name.strip_prefix(PREFIX) else {
        return Stored::Unknown;
    };
    if name.contains(".original_module.") {
        return Stored::Replaced;
    }
    let mut name = name
        .replace(".modules_to_save.default.", ".")
        .replace(".modules_to_save.", ".")
        .replace(".base_layer.", ".")
        .replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.");
    for end in [".weight", ".default", ".default.weight"] {
        if let Some(module) = name.strip_suffix(&format!("{MAGNITUDE}{end}")) {
            name = format!("{module}{MAGNITUDE}");
        }
    }
    Stored::As(name)
}

/// The name that PEFT gives in a file. `adapted` tells whether a module has LoRA: the rest of it
/// then stands in the wrapped linear.
pub(super) fn written(name: &str, adapted: impl Fn(&str) -> bool) -> String {
    match name.rsplit_once('.') {
        Some((module, "bias")) if adapted(module) => format!("{PREFIX}{module}.base_layer.bias"),
        _ => format!("{PREFIX}{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_versions_are_read() {
        for (stored, name) in [
            ("q.lora_A.weight", "q.lora_A.weight"),
            ("q.lora_B.default.weight", "q.lora_B.weight"),
            ("q.lora_magnitude_vector", "q.lora_magnitude_vector"),
            ("q.lora_magnitude_vector.weight", "q.lora_magnitude_vector"),
            ("q.lora_magnitude_vector.default", "q.lora_magnitude_vector"),
            (
                "q.lora_magnitude_vector.default.weight",
                "q.lora_magnitude_vector",
            ),
            ("q.base_layer.bias", "q.bias"),
            ("classifier.modules_to_save.default.bias", "classifier.bias"),
            (
                "classifier.modules_to_save.dense.bias",
                "classifier.dense.bias",
            ),
            ("classifier.bias", "classifier.bias"),
        ] {
            let found = read(&format!("{PREFIX}{stored}"));
            assert_eq!(found, Stored::As(name.to_owned()), "{stored}");
        }
        let replaced = format!("{PREFIX}classifier.original_module.bias");
        assert_eq!(read(&replaced), Stored::Replaced);
        assert_eq!(read("classifier.bias"), Stored::Unknown);
    }

    #[test]
    fn a_bias_is_written_where_peft_looks_for_it() {
        let adapted = |module: &str| module == "q";
        assert_eq!(
            written("q.bias", adapted),
            format!("{PREFIX}q.base_layer.bias")
        );
        assert_eq!(written("k.bias", adapted), format!("{PREFIX}k.bias"));
        assert_eq!(
            written("q.lora_A.weight", adapted),
            format!("{PREFIX}q.lora_A.weight")
        );
    }
}
