"""Texts without labels for a teacher to label: training texts with words exchanged, and pieces of them.

    python reports/quality/variants.py --train data/tweet-valence/train.jsonl \
        --but-not data/tweet-valence/validation.jsonl data/tweet-valence/test.jsonl \
        --encoder ~/.cache/kdlora/encoders/mpnet-base --copies 3 --out more.jsonl

Needs numpy and safetensors. A word is exchanged, with the probability --share, for one of its
nearest neighbours among the encoder's word embeddings, as TinyBERT (arXiv 1909.10351) augments its
data by GloVe. --out gets the training rows, behind them as many variants, and --pieces pieces: every
other a part of a text, the rest parts of two texts joined, after the n-gram sampling of Tang and
others (arXiv 1903.12136).
"""

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

NEIGHBOURS = 16
LEAST_COSINE = 0.25
# Too frequent for their neighbours to mean anything.
STAY = set(
    "the and for are was but not with that this from have has its it's you they their than then"
    " who what when which into about all one".split()
)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, type=Path, help="JSONL with text and label")
    parser.add_argument("--but-not", nargs="*", type=Path, default=[], help="JSONL to keep out")
    parser.add_argument("--encoder", required=True, type=Path, help="folder of the teacher's")
    parser.add_argument("--copies", type=int, default=2, help="variants tried of each text")
    parser.add_argument("--share", type=float, default=0.4, help="of the words exchanged")
    parser.add_argument("--pieces", type=int, default=0, help="parts of texts, alone or joined")
    parser.add_argument("--out", required=True, type=Path)
    return parser.parse_args()


def rows(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def neighbours(encoder, texts):
    """The words that each word of the texts may be exchanged for."""
    vocabulary = json.loads((encoder / "tokenizer.json").read_text())["model"]["vocab"]
    words = [(word, i) for word, i in vocabulary.items() if re.fullmatch("[a-z]{3,}", word)]
    names = [word for word, _ in words]
    place = {word: i for i, word in enumerate(names)}
    weights = load_file(encoder / "model.safetensors")
    table = next(t for name, t in weights.items() if name.endswith("word_embeddings.weight"))
    vectors = table.astype("f4")[[i for _, i in words]]
    vectors -= vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    used = {word for text in texts for word in re.findall("[a-z]+", text.lower())}
    near = {}
    used = sorted(used & place.keys())
    for start in range(0, len(used), 512):
        some = used[start : start + 512]
        cosines = vectors[[place[word] for word in some]] @ vectors.T
        nearest = np.argpartition(-cosines, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        for word, candidates, row in zip(some, nearest, cosines):
            near[word] = [names[j] for j in candidates if names[j] != word and row[j] > LEAST_COSINE]
    return near


def variant(text, near, share, dice):
    parts = re.split("([A-Za-z]+)", text)
    for i, part in enumerate(parts):
        candidates = near.get(part.lower())
        if candidates and part.lower() not in STAY and dice.random() < share:
            parts[i] = dice.choice(candidates)
    return "".join(parts)


def pieces(texts, count, kept_out):
    dice = random.Random(7)

    def part(words, least, most):
        length = min(len(words), dice.randint(least, most))
        start = dice.randint(0, len(words) - length)
        return words[start : start + length]

    seen, new = set(texts), []
    # Few and short texts have fewer pieces than may be asked for.
    for _ in range(10 * count):
        if len(new) == count:
            break
        words = dice.choice(texts).split()
        if dice.random() < 0.5:
            piece = part(words, 3, max(4, int(len(words) * 0.8)))
        else:
            others = dice.choice(texts).split()
            piece = part(words, 3, 15) + part(others, 3, 15)
        piece = " ".join(piece)
        if piece not in seen and piece.lower() not in kept_out:
            seen.add(piece)
            new.append(piece)
    return new


def main():
    asked = arguments()
    train = rows(asked.train)
    texts = [row["text"] for row in train]
    near = neighbours(asked.encoder, texts)
    dice = random.Random(5)
    seen, variants = set(texts), []
    for text in texts:
        for _ in range(asked.copies):
            new = variant(text, near, asked.share, dice)
            if new not in seen:
                seen.add(new)
                variants.append(new)
    kept_out = {row["text"].strip().lower() for path in asked.but_not for row in rows(path)}
    random.Random(3).shuffle(variants)
    variants = [text for text in variants if text.strip().lower() not in kept_out]
    new = variants[: len(train)] + pieces(texts, asked.pieces, kept_out)
    with asked.out.open("w", encoding="utf-8") as out:
        for row in train + [{"text": text} for text in new]:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
