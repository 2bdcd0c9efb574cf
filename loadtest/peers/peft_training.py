"""LoRA training of one encoder with Hugging Face PEFT in PyTorch, for comparison with kdlora.

    python loadtest/peers/peft_training.py --encoder ~/.cache/kdlora/minilm-l6 \
        --train data/movie-sentiment/train.jsonl --steps 60 --out peft.json

Needs torch, transformers and peft. The settings are those of a kdlora pass without a teacher:
LoRA r 8, alpha 16, dropout 0.1 on query and value and a trained head, AdamW with weight decay on
matrices, linear warm-up and decay, clipping at 1. Each batch is padded to its longest row.

Prints, and writes to --out: tokens a second (padding not counted) without the first steps, the
process's peak resident memory (on a GPU the most of its memory that tensors had), and the loss of
every step. With `--dtype bf16` (so by default with `--device cuda`) the frozen weights are in bf16,
what trains is in f32, as in kdlora.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_STEPS = 3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True, help="folder in Hugging Face's layout")
    parser.add_argument("--train", required=True, type=Path, help="JSONL with text and label")
    parser.add_argument("--rows", type=int, help="only the first of them")
    parser.add_argument("--steps", type=int, help="stop after so many [all of the epochs]")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="query,value", help="or all-linear")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="[f32 on the CPU, bf16 on a GPU]")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.dtype = args.dtype or ("f32" if args.device == "cpu" else "bf16")
    return args


def peak_resident_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None


def peak_bytes(device):
    if device == "cpu":
        return peak_resident_bytes()
    return torch.cuda.max_memory_allocated()


def make_model(args, labels):
    model = AutoModelForSequenceClassification.from_pretrained(
        args.encoder,
        num_labels=labels,
        dtype=DTYPES[args.dtype],
        # kdlora drops out inputs of LoRA and of the head, nothing inside the encoder.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.1,
    )
    all_linear = args.targets == "all-linear"
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.1,
        target_modules="all-linear" if all_linear else args.targets.split(","),
        # kdlora trains BERT's pooler as a part of the head.
        modules_to_save=["classifier", "pooler"],
    )
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.to(args.device)


def make_optimizer(model, args, steps):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    warm_up = max(1, -(-steps * 6 // 100))

    def factor(step):
        if step < warm_up:
            return (step + 1) / warm_up
        return (steps - step) / max(1, steps - warm_up + 1)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor), trained


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.train.read_text().splitlines()][: args.rows]
    names = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    encoded = tokenizer(
        [row["text"] for row in rows], truncation=True, max_length=args.max_length
    )["input_ids"]
    examples = list(zip(encoded, [names.index(row["label"]) for row in rows]))
    model = make_model(args, len(names))
    model.train()
    per_epoch = -(-len(examples) // args.batch_size)
    steps = args.epochs * per_epoch
    optimizer, schedule, trained = make_optimizer(model, args, steps)

    losses, tokens, start = [], 0, None
    shuffler = random.Random(args.seed)
    for _ in range(args.epochs):
        shuffler.shuffle(examples)
        for first in range(0, len(examples), args.batch_size):
            if args.steps is not None and len(losses) == args.steps:
                break
            if len(losses) == WARM_UP_STEPS:
                tokens, start = 0, time.perf_counter()
            batch = examples[first : first + args.batch_size]
            padded = tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, return_tensors="pt")
            labels = torch.tensor([label for _, label in batch])
            padded, labels = padded.to(args.device), labels.to(args.device)
            # What trains is in f32 among frozen weights in bf16: PyTorch mixes them by autocast.
            mixed = args.dtype == "bf16"
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=mixed):
                loss = model(**padded, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            tokens += sum(len(ids) for ids, _ in batch)
    seconds = time.perf_counter() - start
    result = {
        "peer": f"peft {__import__('peft').__version__}, torch {torch.__version__}",
        "threads": args.threads,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "steps": len(losses),
        "trainable": sum(p.numel() for p in trained),
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak_bytes(args.device),
        "losses": losses,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['peer']}: {result['tokens_per_second']:.0f} tokens/s over {len(losses)} steps,")
    print(f"peak {result['peak_bytes'] / 2**20:.0f} MiB, {result['trainable']} trained")
    for at in range(0, len(losses), 10):
        part = losses[at : at + 10]
        print(f"steps {at + 1} to {at + len(part)}: loss {sum(part) / len(part):.4f}")


if __name__ == "__main__":
    main()
