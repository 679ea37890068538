"""The figures of `benchmarks/data_of_any_size.py`, scaled down: rows cost time, and next to no memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# Measured within one process: what imports and tokenizer take is there after the few rows.
SCRIPT = """
import json, sys
import psutil
from glmtune.data import dataset
from glmtune.data.encoded import passing
from glmtune.data.check import check_data
from glmtune.data.reading import text_rows
from glmtune.data.rows import row_set
from glmtune.data.settings import DataSettings
from glmtune.loading import load_tokenizer
from glmtune.training.row_order import EpochSampler

passing.LARGE_BYTES = text_rows.STREAMED_BYTES = 1
process, peak = psutil.Process(), 0
tokenizer = load_tokenizer("glm-tiny")
few, many, cache = sys.argv[1:]
calls = []
real = passing.run_batches
def counted(task, *args, **settings):
    for each in real(task, *args, **{**settings, "num_workers": 1}):
        calls.append(task)
        look()
        yield each
passing.run_batches = counted

def look():
    global peak
    peak = max(peak, process.memory_info().rss)

def start(file):
    settings = DataSettings(train_file=file, cache_dir=cache)
    report = check_data(settings, tokenizer)
    look()
    split = dataset.load_split(settings, "train", tokenizer)
    rows = row_set(split, split.settings, seed=1)
    order = EpochSampler(rows.lengths, batch_size=4, group_by_length=True, seed=1)
    first = [rows.rows[row]["input_ids"] for _, row in zip(range(8), order)]
    look()
    return report.splits[0].num_tokens, len(rows.lengths), len(first)

start(few)
before, peak = process.memory_info().rss, 0
cold = start(many)
cold_bytes, num_calls = peak - before, len(calls)
peak = 0
warm = start(many)
print(json.dumps({"same": cold == warm, "rows": cold[1], "cold": cold_bytes, "warm": peak - before,
                  "encoded": num_calls, "encoded again": len(calls) - num_calls}))
"""


def write_rows(file: Path, count: int) -> str:
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = {"content": f"{number}#" + "颜色*" * 10, "summary": "柔软舒服" * 15}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(file)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    many = 20_000
    places = [write_rows(tmp_path / f"{count}.jsonl", count) for count in (300, many)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *places, str(tmp_path / "cache")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["same"]
    assert found["rows"] == many
    assert found["encoded"] > 0
    assert found["encoded again"] == 0, "the second start takes what the first has kept"
    # All in memory they took some 130 MB (6.6 KB each); now a table that waits to be written, and lengths.
    assert found["cold"] < 60e6
    assert found["warm"] < 60e6
