"""Writes tests/golden/parquet with pyarrow (26.0.1): rows as Hugging Face's `datasets` and others write them.

    pip install pyarrow && python tests/golden/make_parquet.py
"""

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
