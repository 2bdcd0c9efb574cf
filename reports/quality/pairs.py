"""Adds pairs without labels to training rows of two texts each: the texts of the rows, paired anew by chance.

    python reports/quality/pairs.py --train pairs.jsonl --count 8000 --out more.jsonl
"""

import argparse
import json
import random


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", required=True)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    with open(args.train, encoding="utf-8") as file:
        train = [json.loads(line) for line in file]
    texts = sorted({row[column] for row in train for column in ("text", "text_pair")})
    seen = {(row["text"], row["text_pair"]) for row in train}
    chance = random.Random(args.seed)
    new = []
    while len(new) < args.count:
        pair = tuple(chance.sample(texts, 2))
        if pair not in seen:
            seen.add(pair)
            new.append({"text": pair[0], "text_pair": pair[1]})
    with open(args.out, "w", encoding="utf-8") as out:
        for row in train + new:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(train)} rows with labels, {len(new)} pairs of their {len(texts)} texts without")


if __name__ == "__main__":
    main()
