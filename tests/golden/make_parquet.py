"""Writes tests/golden/parquet with pyarrow (26.0.1): rows as Hugging Face's `datasets` and others write them.

    pip install pyarrow && python tests/golden/make_parquet.py
"""

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(__file__).parent / "parquet"
OUT.mkdir(exist_ok=True)

ROWS = 24
pairs = pa.table(
    {
        "sentence1": [f"first {i}" for i in range(ROWS)],
        "sentence2": [f"second {i} 😀" for i in range(ROWS)],
        "label": pa.array([i % 2 for i in range(ROWS)], pa.int64()),
        "idx": pa.array(range(ROWS), pa.int32()),
    }
)
# Several row groups and pages, dictionaries: as `datasets` writes them.
pq.write_table(pairs, OUT / "train-00000-of-00001.parquet", compression="snappy", row_group_size=10)
test = pairs.slice(0, 4).set_column(0, "sentence1", [[f"held out {i}" for i in range(4)]])
pq.write_table(test, OUT / "validation-00000-of-00001.parquet", compression="snappy")

mixed = pa.table(
    {
        "body": ["one", "two", None, "four"],
        "score": pa.array([0.5, -1.25, 2.0, None], pa.float64()),
        "logits": pa.array([[0.5], [-1.0], [2.0], [0.25]], pa.list_(pa.float32())),
        "embedding": pa.array([[0.0] * 8] * 4, pa.list_(pa.float32())),
    }
)
for compression in ["zstd", "gzip", "none"]:
    pq.write_table(mixed, OUT / f"mixed-{compression}.parquet", compression=compression, use_dictionary=False)


def with_features(table: pa.Table, label: dict) -> pa.Table:
    """The table with the description that `datasets` adds to the metadata."""
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": label}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


# As `datasets` writes classes: -1 and null are rows without a label.
texts = [f"text {i}" for i in range(ROWS)]
CLASSES = {"names": ["negative", "positive"], "_type": "ClassLabel"}
ids = [-1 if i == 5 else None if i == 7 else i % 2 for i in range(ROWS)]
single = pa.table({"text": texts, "label": pa.array(ids, pa.int64())})
pq.write_table(with_features(single, CLASSES), OUT / "classes.parquet")
several = pa.table({"text": texts, "label": pa.array([[0], [0, 1], []] * 8, pa.list_(pa.int64()))})
pq.write_table(with_features(several, {"feature": CLASSES, "_type": "List"}), OUT / "lists-of-classes.parquet")
beyond = pa.table({"text": texts, "label": pa.array([i % 3 for i in range(ROWS)], pa.int64())})
pq.write_table(with_features(beyond, CLASSES), OUT / "beyond-classes.parquet")

types = pa.table(
    {
        "text": texts,
        "half": pa.array([i / 4 for i in range(ROWS)], pa.float16()),
        "decimal": pa.array([Decimal(i) / 4 for i in range(ROWS)], pa.decimal128(6, 2)),
        "struct": pa.array([{"en": text} for text in texts]),
        "bytes": pa.array([b"\xff\xfe"] * ROWS),
    }
)
pq.write_table(types, OUT / "types.parquet")
