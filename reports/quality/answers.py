"""Adds a teacher's logits to rows of one text each, asking a kdlora server that serves the teacher.

In eight bits a server answers a few times as many texts as a pass does, which asks its teacher in f32.

    kdlora adapter import models/adapters/movie-sentiment/teacher --student mpnet-base \
        --task movie-sentiment --promote --state teacher
    kdlora serve --student mpnet-base --dtype int8 --state teacher --bind 127.0.0.1:9001 \
        --max-queue-wait 60s --merged-tasks movie-sentiment
    python reports/quality/answers.py --rows more.jsonl --task movie-sentiment --out answered.jsonl
"""

import argparse
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

BATCH = 64


def get(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def ready(url):
    """Whether the server has loaded its models; it must be running."""
    try:
        urllib.request.urlopen(f"{url}/readyz").close()
        return True
    except urllib.error.HTTPError:
        return False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:9001")
    parser.add_argument("--task", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    while not ready(args.url):
        time.sleep(0.5)
    labels = get(f"{args.url}/v1/tasks/{args.task}")["labels"]
    with open(args.rows, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def logits(batch):
        body = {"inputs": [row["text"] for row in batch], "raw_scores": True, "truncate": True}
        answer = get(f"{args.url}/v1/classify/{args.task}", body)
        for prediction in answer["predictions"]:
            value, scores = prediction.get("value"), prediction.get("scores")
            yield [value] if scores is None else [scores[label] for label in labels]

    # Batches of like length end at about the same time.
    rows.sort(key=lambda row: len(row["text"]))
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    with ThreadPoolExecutor(3) as pool, open(args.out, "w", encoding="utf-8") as out:
        for batch, answers in zip(batches, pool.map(lambda batch: list(logits(batch)), batches)):
            for row, answer in zip(batch, answers):
                out.write(json.dumps({**row, "teacher_logits": answer}, ensure_ascii=False) + "\n")
    print(f"{len(rows)} rows answered")


if __name__ == "__main__":
    main()
