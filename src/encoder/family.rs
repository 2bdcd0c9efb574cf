//! The supported architectures, and how each spells the names of its weights.

/// An encoder architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Bert,
    Roberta,
    DistilBert,
    Mpnet,
    /// DeBERTa v2 and v3, which differ in their checkpoints only.
    DebertaV2,
}

impl Family {
    pub const ALL: [Self; 5] = [
        Self::Bert,
        Self::Roberta,
        Self::DistilBert,
        Self::Mpnet,
        Self::DebertaV2,
    ];

    /// `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roberta => "roberta",
            Self::DistilBert => "distilbert",
            Self::Mpnet => "mpnet",
            Self::DebertaV2 => "deberta-v2",
        }
    }

    /// What the names of the encoder's weights begin with in a classifier's file, before a dot.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roberta => "roberta",
            Self::DistilBert => "distilbert",
            Self::Mpnet => "mpnet",
            Self::DebertaV2 => "deberta",
        }
    }

    /// The family's class in `transformers` for classification.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Bert => "BertForSequenceClassification",
            Self::Roberta => "RobertaForSequenceClassification",
            Self::DistilBert => "DistilBertForSequenceClassification",
            Self::Mpnet => "MPNetForSequenceClassification",
            Self::DebertaV2 => "DebertaV2ForSequenceClassification",
        }
    }

    /// Modules of the classification head that stand beside the encoder, outside its prefix.
    pub fn head_modules(self) -> &'static [&'static str] {
        match self {
            Self::Bert | Self::Roberta | Self::Mpnet => &["classifier"],
            Self::DistilBert => &["pre_classifier", "classifier"],
            Self::DebertaV2 => &["pooler", "classifier"],
        }
    }

    /// Whether a weight or module, named without the prefix, stands outside it.
    pub fn is_head(self, name: &str) -> bool {
        let first = name.split('.').next().unwrap_or_default();
        self.head_modules().contains(&first)
    }

    /// The name in a classifier's file of what is called `name` here.
    pub fn full_name(self, name: &str) -> String {
        match self.is_head(name) {
            true => name.to_owned(),
            false => format!("{}.{name}", self.prefix()),
        }
    }

    /// The name here of what a classifier's file calls `name`; `None` for a part of another
    /// family.
    pub fn short_name(self, name: &str) -> Option<&str> {
        if self.is_head(name) {
            return Some(name);
        }
        name.strip_prefix(self.prefix())?.strip_prefix('.')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_after_a_round() {
        for family in Family::ALL {
            for name in ["encoder.layer.0.output.dense", "classifier.weight"] {
                assert_eq!(family.short_name(&family.full_name(name)), Some(name));
            }
        }
        assert_eq!(Family::Bert.full_name("pooler.dense"), "bert.pooler.dense");
        assert_eq!(
            Family::DistilBert.full_name("pre_classifier.bias"),
            "pre_classifier.bias"
        );
        assert_eq!(Family::DebertaV2.full_name("pooler.dense"), "pooler.dense");
        assert_eq!(Family::Bert.short_name("mpnet.encoder.layer"), None);
    }
}
