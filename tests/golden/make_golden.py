"""Makes the golden files: small random models of transformers, LoRA adapters of peft, and what
they answer.

    pip install -r requirements.txt
    python make_golden.py

Everything is seeded, so a second run on the same versions (requirements.txt) changes the files by
rounding at most. Weights are drawn far wider than a trained model's, so that every part of the
network is seen in the logits: attention that is nearly uniform would hide a wrong mask.

What is written beside this script:

    models/NAME/        a classifier in the Hugging Face layout
    adapters/NAME/      a PEFT LoRA folder, with the config.json of its task
    tokenizers/NAME/    a tokenizer (see texts.py)
    cases.json          models, adapters, token ids, and the logits of each sequence alone
    training/NAME.safetensors   losses and gradients of one step (see `step`)
    tokens.json, settings.json   texts, and their ids by AutoTokenizer (see make_tokens.py)
"""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    MPNetConfig,
    RobertaConfig,
)

import make_tokens
from make_tokens import write_json

HERE = Path(__file__).parent
VOCABULARY = 60

MODELS = {
    # Pairs: two segments.
    "bert-pairs": BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=72,
        type_vocab_size=2,
        vocab_size=VOCABULARY,
        num_labels=2,
        problem_type="single_label_classification",
        layer_norm_eps=1e-12,
    ),
    # An odd number of heads, one segment only, labels of their own.
    "bert-labels": BertConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=28,
        max_position_embeddings=48,
        type_vocab_size=1,
        vocab_size=VOCABULARY,
        num_labels=5,
        problem_type="multi_label_classification",
        layer_norm_eps=1e-5,
    ),
    # One head.
    "bert-value": BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=24,
        max_position_embeddings=48,
        type_vocab_size=2,
        vocab_size=VOCABULARY,
        num_labels=1,
        problem_type="regression",
    ),
    # Long enough for the outermost relative positions (128 and beyond).
    "mpnet-classes": MPNetConfig(
        hidden_size=30,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=48,
        max_position_embeddings=194,
        vocab_size=VOCABULARY,
        num_labels=5,
        problem_type="single_label_classification",
        layer_norm_eps=1e-5,
        pad_token_id=1,
    ),
    "mpnet-value": MPNetConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=50,
        vocab_size=VOCABULARY,
        num_labels=1,
        problem_type="regression",
        pad_token_id=1,
    ),
    # Positions behind the padding index, one segment, a norm of its own width.
    "roberta-classes": RobertaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=36,
        max_position_embeddings=50,
        type_vocab_size=1,
        vocab_size=VOCABULARY,
        num_labels=3,
        problem_type="single_label_classification",
        layer_norm_eps=1e-5,
        pad_token_id=1,
    ),
    "distilbert-classes": DistilBertConfig(
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=44,
        max_position_embeddings=48,
        vocab_size=VOCABULARY,
        num_labels=2,
        problem_type="single_label_classification",
        attention_dropout=0.0,
        dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    # As DeBERTa v3: no absolute positions, buckets, normalised position embeddings that go through
    # the content's projections.
    "deberta-classes": DebertaV2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=36,
        max_position_embeddings=48,
        vocab_size=VOCABULARY,
        num_labels=3,
        problem_type="single_label_classification",
        relative_attention=True,
        position_buckets=12,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
    ),
    # As the larger models of v2: a convolution beside the first layer.
    "deberta-conv": DebertaV2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=28,
        max_position_embeddings=40,
        vocab_size=VOCABULARY,
        num_labels=5,
        problem_type="multi_label_classification",
        layer_norm_eps=1e-6,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        conv_kernel_size=3,
        conv_act="gelu",
        attention_head_size=8,
    ),
    # Everything the other way: projections of positions, distances cut at ten, absolute positions,
    # two segments, narrower embeddings, a convolution in groups.
    "deberta-value": DebertaV2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        type_vocab_size=2,
        vocab_size=VOCABULARY,
        num_labels=1,
        problem_type="regression",
        embedding_size=20,
        relative_attention=True,
        max_relative_positions=10,
        share_att_key=False,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=True,
        conv_kernel_size=5,
        conv_groups=2,
    ),
    # One layer, one of the terms, a convolution on the last layer.
    "deberta-c2p": DebertaV2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=40,
        vocab_size=VOCABULARY,
        num_labels=2,
        problem_type="single_label_classification",
        relative_attention=True,
        position_buckets=4,
        share_att_key=True,
        pos_att_type=["c2p"],
        position_biased_input=True,
        conv_kernel_size=3,
    ),
    # Saved in half precision.
    "bert-half": BertConfig(
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        type_vocab_size=2,
        vocab_size=VOCABULARY,
        num_labels=2,
        problem_type="single_label_classification",
    ),
}
HALF = {"bert-half"}

# Of a name: its model, and its LoRA.
ADAPTERS = {
    "bert-pairs-qv": (
        "bert-pairs",
        dict(r=4, lora_alpha=8, target_modules=["query", "value"]),
    ),
    "bert-pairs-pooler": (
        "bert-pairs",
        dict(
            r=2,
            lora_alpha=3,
            target_modules=["query", "key", "value", "dense"],
            modules_to_save=["pooler"],
        ),
    ),
    "bert-labels-all": (
        "bert-labels",
        dict(r=3, lora_alpha=6, target_modules="all-linear", use_rslora=True),
    ),
    "mpnet-classes-qv": (
        "mpnet-classes",
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q", "v"],
            rank_pattern={"encoder.layer.1.attention.attn.q": 2},
            alpha_pattern={"v": 5},
        ),
    ),
    "mpnet-value-all": (
        "mpnet-value",
        dict(r=2, lora_alpha=5, target_modules="all-linear"),
    ),
    "roberta-classes-all": (
        "roberta-classes",
        dict(r=3, lora_alpha=6, target_modules="all-linear"),
    ),
    "distilbert-classes-qv": (
        "distilbert-classes",
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_lin", "v_lin", "lin1"],
            modules_to_save=["pre_classifier"],
        ),
    ),
    "deberta-classes-qv": (
        "deberta-classes",
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["query_proj", "value_proj"],
            modules_to_save=["pooler"],
        ),
    ),
    # The pooler stays the base's.
    "deberta-conv-all": (
        "deberta-conv",
        dict(r=2, lora_alpha=5, target_modules="all-linear"),
    ),
    # Projections of positions and of embeddings too.
    "deberta-value-all": (
        "deberta-value",
        dict(r=3, lora_alpha=6, target_modules="all-linear"),
    ),
    "deberta-c2p-k": (
        "deberta-c2p",
        dict(r=2, lora_alpha=4, target_modules=["key_proj"]),
    ),
    # PEFT wraps pre_classifier with the classifier: its name ends with the other's.
    "distilbert-classes-plain": (
        "distilbert-classes",
        dict(r=2, lora_alpha=4, target_modules=["k_lin", "lin2"]),
    ),
    "bert-pairs-dora": (
        "bert-pairs",
        dict(
            r=3,
            lora_alpha=4,
            target_modules=["query", "value", "output.dense"],
            use_dora=True,
            use_rslora=True,
        ),
    ),
    # Positions go through the adapted projections too, and the base's pooler is adapted.
    "deberta-classes-dora": (
        "deberta-classes",
        dict(r=2, lora_alpha=3, target_modules="all-linear", use_dora=True, bias="lora_only"),
    ),
    "mpnet-classes-dora": (
        "mpnet-classes",
        dict(r=2, lora_alpha=4, target_modules=["k", "o"], use_dora=True, bias="all"),
    ),
    "roberta-classes-bias": (
        "roberta-classes",
        dict(r=2, lora_alpha=4, target_modules=["value"], bias="all"),
    ),
    "bert-labels-bias": (
        "bert-labels",
        dict(r=2, lora_alpha=4, target_modules=["key", "intermediate.dense"], bias="lora_only"),
    ),
    "bert-labels-layers": (
        "bert-labels",
        dict(
            r=2,
            lora_alpha=4,
            target_modules=["query", "value"],
            layers_to_transform=[0, 2],
            layers_pattern="layer",
        ),
    ),
    "distilbert-classes-regex": (
        "distilbert-classes",
        dict(
            r=2,
            lora_alpha=4,
            target_modules=r"(?!.*layer\.0).*\.(q_lin|lin1)",
            rank_pattern={r"layer\.\d+\.ffn\..*": 3},
        ),
    ),
    # A module of the encoder trained whole.
    "bert-pairs-saved": (
        "bert-pairs",
        dict(
            r=2,
            lora_alpha=4,
            target_modules=["value"],
            exclude_modules=["layer.1.attention.self.value"],
            modules_to_save=["classifier", "pooler", "embeddings.LayerNorm"],
        ),
    ),
    "bert-pairs-half": (
        "bert-pairs",
        dict(r=2, lora_alpha=4, target_modules=["query", "dense"]),
    ),
    # As old versions of PEFT wrote it: see `make_old`.
    "bert-pairs-old": (
        "bert-pairs",
        dict(r=2, lora_alpha=4, target_modules=["key"]),
    ),
}
HALF_ADAPTERS = {"bert-pairs-half"}
OLD_ADAPTERS = {"bert-pairs-old"}

# The gradients of one step: of a model or an adapter, and the loss.
STEPS = {
    "bert-pairs": ["cross_entropy"],
    "mpnet-value": ["mse"],
    "bert-pairs-qv": ["cross_entropy", "kl"],
    "bert-labels-all": ["bce"],
    "mpnet-classes-qv": ["cross_entropy", "kl"],
    "distilbert-classes": ["cross_entropy"],
    "roberta-classes-all": ["cross_entropy", "kl"],
    "distilbert-classes-qv": ["kl"],
    "deberta-classes-qv": ["cross_entropy", "kl"],
    "deberta-conv-all": ["bce"],
    "deberta-value": ["mse"],
    "deberta-value-all": ["mse"],
    "deberta-classes": ["cross_entropy"],
    "distilbert-classes-plain": ["cross_entropy"],
    "bert-pairs-dora": ["cross_entropy", "kl"],
}
TEMPERATURE = 2.0


def randomize(model, generator):
    """Weights wide enough for attention to be sharp; norms near 1; nothing left at zero."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "LayerNorm" in name or "layer_norm" in name
        if norm and name.endswith("weight"):
            parameter.data = 1 + 0.2 * noise
        elif norm or name.endswith("bias"):
            parameter.data = 0.2 * noise
        elif "embeddings" in name:
            parameter.data = 0.5 * noise
        elif "relative_attention_bias" in name:
            parameter.data = noise
        else:
            width = 3 if "classifier" in name else 1.5
            parameter.data = noise * width / parameter[0].numel() ** 0.5


def make_model(name, config, seed):
    config.id2label = {i: f"label {i}" for i in range(config.num_labels)}
    config.label2id = {label: i for i, label in config.id2label.items()}
    if not isinstance(config, DistilBertConfig):
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    kind = AutoModelForSequenceClassification
    model = kind.from_config(config, attn_implementation="eager").float()
    randomize(model, torch.Generator().manual_seed(seed))
    model = model.half() if name in HALF else model
    model.save_pretrained(HERE / "models" / name)
    return model.float().eval()


def make_adapter(name, model_name, options, seed):
    model = load_model(model_name)
    config = LoraConfig(task_type="SEQ_CLS", lora_dropout=0.0, **options)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if ".lora_B." in parameter_name:
                # Updates half as wide as the weights that they are added to.
                layer = wrapped.get_submodule(parameter_name.split(".lora_B.")[0])
                noise *= 0.75 / (layer.scaling["default"] * parameter.shape[1] ** 0.5)
            elif ".lora_A." in parameter_name:
                noise /= parameter.shape[1] ** 0.5
            elif "magnitude" in parameter_name:
                noise = parameter.data * (1 + 0.2 * noise)
            elif parameter.dim() == 2:
                noise *= 3 / parameter.shape[1] ** 0.5
            else:
                noise *= 0.2
            parameter.data = noise
    wrapped.eval()
    wrapped.peft_config["default"].base_model_name_or_path = model_name
    # The order of a Python set changes from run to run.
    saved = wrapped.peft_config["default"]
    if not isinstance(saved.target_modules, str):
        saved.target_modules = sorted(saved.target_modules)
    if name in HALF_ADAPTERS:
        wrapped = wrapped.half()
    folder = HERE / "adapters" / name
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink()
    task = {
        "model_type": model.config.model_type,
        "id2label": model.config.id2label,
        "label2id": model.config.label2id,
        "problem_type": model.config.problem_type,
    }
    (folder / "config.json").write_text(json.dumps(task, indent=2) + "\n")


def make_old(folder):
    """The adapter's name in the names of tensors, and a head that the configuration leaves out."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["modules_to_save"] = None
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "adapter_model.safetensors"
    tensors = {
        name.replace(".weight", ".default.weight") if ".lora_" in name else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})


def load_model(name):
    return AutoModelForSequenceClassification.from_pretrained(
        HERE / "models" / name, attn_implementation="eager", dtype=torch.float32
    )


def load_adapter(name):
    return PeftModel.from_pretrained(
        load_model(ADAPTERS[name][0]), HERE / "adapters" / name, is_trainable=True
    )


def sequences(config, seed):
    """Token ids of very different lengths, the shortest and the longest possible among them."""
    numbers = numpy.random.default_rng(seed)
    # MPNet and RoBERTa have fairseq's special tokens and positions.
    fairseq = config.model_type in ["mpnet", "roberta"]
    first, last, pad = (0, 2, 1) if fairseq else (2, 3, 0)
    longest = config.max_position_embeddings - (2 if fairseq else 0)
    made = []
    for length in [2, 3, 5, 1, 17, longest, 8, 30, 2]:
        ids = numbers.integers(5, VOCABULARY, size=length).tolist()
        ids[0] = first
        ids[-1] = last
        type_ids = [0] * length
        if has_segments(config) and length > 4:
            border = length // 3 + 1
            ids[border] = last
            type_ids = [int(i > border) for i in range(length)]
        made.append({"ids": ids, "type_ids": type_ids})
    # A text may spell the padding token: it counts as a token (and positions are numbered past it).
    with_pad = dict(made[4])
    with_pad["ids"] = list(with_pad["ids"])
    with_pad["ids"][6] = with_pad["ids"][7] = pad
    return made + [with_pad], pad


def has_segments(config):
    return config.model_type in ["bert", "deberta-v2"] and config.type_vocab_size == 2


def inputs(batch, pad, config):
    width = max(len(s["ids"]) for s in batch)
    rows = {
        "input_ids": [s["ids"] + [pad] * (width - len(s["ids"])) for s in batch],
        "attention_mask": [
            [1] * len(s["ids"]) + [0] * (width - len(s["ids"])) for s in batch
        ],
    }
    if has_segments(config):
        rows["token_type_ids"] = [
            s["type_ids"] + [0] * (width - len(s["ids"])) for s in batch
        ]
    return {name: torch.tensor(row) for name, row in rows.items()}


def logits_case(name, model, config, seed, adapter=None):
    made, pad = sequences(config, seed)
    with torch.no_grad():
        alone = [model(**inputs([s], pad, config)).logits for s in made]
        padded = model(**inputs(made, pad, config)).logits
    alone = torch.cat(alone)
    difference = (alone - padded).abs().max().item()
    spread = alone.std(0).min().item()
    print(f"{name}: alone and padded differ by {difference:.1e}; spread {spread:.2f}")
    assert difference < 2e-5 and spread > 0.05
    for sequence, one, other in zip(made, alone.tolist(), padded.tolist()):
        sequence["logits"] = one
        sequence["padded_logits"] = other
    model_name = ADAPTERS[adapter][0] if adapter else name
    return {"name": name, "model": model_name, "adapter": adapter, "sequences": made}


def step(name, model, config, losses, seed):
    """One step over the sequences of a case as a batch, all but the last (torch never trains the
    embedding of the padding token): for each loss its value and the gradient of every weight that
    trains. Targets are drawn here and stored too.

    cross_entropy: mean over the batch. kl: T² · KL(teacher ‖ student), both at temperature T,
    summed over classes and averaged over the batch. bce, mse: mean over all outputs.
    """
    made, pad = sequences(config, seed)
    made = made[:-1]
    batch = inputs(made, pad, config)
    generator = torch.Generator().manual_seed(seed + 1)
    rows, columns = len(made), config.num_labels
    teacher = 2 * torch.randn(rows, columns, generator=generator)
    classes = torch.randint(columns, (rows,), generator=generator)
    labels = torch.randint(2, (rows, columns), generator=generator).float()
    stored = {"teacher_logits": teacher, "classes": classes, "labels": labels}
    for loss_name in losses:
        model.train()
        model.zero_grad()
        logits = model(**batch).logits
        loss = {
            "cross_entropy": lambda: F.cross_entropy(logits, classes),
            "bce": lambda: F.binary_cross_entropy_with_logits(logits, labels),
            "mse": lambda: F.mse_loss(logits, teacher),
            "kl": lambda: TEMPERATURE**2
            * F.kl_div(
                F.log_softmax(logits / TEMPERATURE, -1),
                F.softmax(teacher / TEMPERATURE, -1),
                reduction="batchmean",
            ),
        }[loss_name]()
        loss.backward()
        stored[f"{loss_name}/loss"] = loss.detach()
        for parameter_name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                raise ValueError(f"{parameter_name} has no gradient")
            short = parameter_name.removeprefix("base_model.model.")
            short = short.replace(".default", "").replace(".modules_to_save", "")
            stored[f"{loss_name}/{short}"] = parameter.grad.clone()
        gradients = [k for k in stored if k.startswith(f"{loss_name}/")]
        print(f"{name}, {loss_name}: loss {loss.item():.4f}, {len(gradients) - 1} gradients")
    folder = HERE / "training"
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / f"{name}.safetensors")


def main():
    for folder in ["models", "adapters", "training"]:
        shutil.rmtree(HERE / folder, ignore_errors=True)
    torch.set_num_threads(1)
    cases = []
    for seed, (name, config) in enumerate(MODELS.items()):
        model = make_model(name, config, seed)
        cases.append(logits_case(name, model, config, seed))
        if name in STEPS:
            step(name, load_model(name), config, STEPS[name], seed)
    for seed, (name, (model_name, options)) in enumerate(ADAPTERS.items(), start=100):
        make_adapter(name, model_name, options, seed)
        config = MODELS[model_name]
        adapter = load_adapter(name)
        adapter.eval()
        cases.append(logits_case(name, adapter, config, seed, adapter=name))
        if name in STEPS:
            step(name, adapter, config, STEPS[name], seed)
        if name in OLD_ADAPTERS:
            make_old(HERE / "adapters" / name)
    write_json(HERE / "cases.json", cases)
    make_tokens.main()


if __name__ == "__main__":
    main()
