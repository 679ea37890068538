"""Download a benchmark from the Hugging Face hub, and write it in its official layout."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from evaluation.benchmarks.benchmark import subject_table
from evaluation.sample import LETTERS
from glmtune.errors import ConfigError, DataError
from glmtune.storage.files import write_text_atomically

Row = Mapping[str, Any]
Rows = Iterable[Row]


Load = Callable[[str, str, str], Rows]


def load_rows(repository: str, config: str, split: str) -> Rows:
    """Return the rows of one configuration and split of a hub data set."""
    from datasets import load_dataset

    return cast(Rows, load_dataset(repository, config, split=split))


def fetch_from_hub(name: str, folder: Path, load: Load | None = None) -> Path:
    """Download a benchmark and write its official files.

    Every file is written whole, and one that is there already is not fetched again, so a download that was
    cut off goes on where it stopped.

    Args:
        name: of the benchmark.
        folder: becomes the folder of its files.
        load: repository, configuration and split to rows; None asks the hub.

    Returns:
        The folder.

    Raises:
        ConfigError: this benchmark is not on the hub in full.
        DataError: the hub cannot be reached or gives other columns.
    """
    if name not in LAYOUTS:
        raise ConfigError(
            f"`benchmark.data_dir` is `hub`, but {name} is not on the hub with its exemplars. Use"
            f" `glmtune data fetch {name}` instead. On the hub: {', '.join(LAYOUTS)}."
        )
    load = load or load_rows
    for path, repository, config, split, render in LAYOUTS[name]():
        target = folder / path
        if target.is_file():
            continue
        try:
            text = render(load(repository, config, split))
        except KeyError as error:
            raise DataError(
                f"{repository} ({config}, {split}) has no column {error}: it is not the data set this was"
                f" written for. Use `glmtune data fetch {name}`."
            ) from None
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{repository} ({config}, {split}) cannot be read from the hub: {error}. Check the network,"
                f" or use `glmtune data fetch {name}`; what was fetched so far is kept in {folder}."
            ) from None
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(target, text)
    return folder


HubFile = tuple[str, str, str, str, Callable[[Rows], str]]
"""Path in the official layout; repository, configuration and split on the hub; rows to the file's text."""


def _ceval() -> list[HubFile]:
    return [
        (f"{split}/{subject}_{split}.csv", "ceval/ceval-exam", subject, split, render)
        for subject in subject_table("ceval")
        for split, render in (("dev", _ceval_dev), ("val", _ceval_val), ("test", _ceval_test))
    ]


def _mmlu() -> list[HubFile]:
    return [
        (f"{split}/{subject}_{split}.csv", "cais/mmlu", subject, theirs, _mmlu_csv)
        for subject in subject_table("mmlu")
        for split, theirs in (("dev", "dev"), ("val", "validation"), ("test", "test"))
    ]


def _json_files(repository: str, files: Mapping[str, tuple[str, str]]) -> Callable[[], list[HubFile]]:
    """Return a layout of JSON lines: path to configuration and split, all columns as they are."""
    return lambda: [(path, repository, config, split, _json_lines) for path, (config, split) in files.items()]


def _json_lines(rows: Rows) -> str:
    return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _table(rows: Rows, columns: tuple[str, ...]) -> str:
    return _csv([columns, *([row[column] for column in columns] for row in rows)])


def _ceval_dev(rows: Rows) -> str:
    return _table(rows, ("id", "question", *LETTERS, "answer", "explanation"))


def _ceval_val(rows: Rows) -> str:
    return _table(rows, ("id", "question", *LETTERS, "answer"))


def _ceval_test(rows: Rows) -> str:
    """Write answers only where the release has them (since July 2025)."""
    rows = list(rows)
    labelled = any(row.get("answer") for row in rows)
    return _ceval_val(rows) if labelled else _table(rows, ("id", "question", *LETTERS))


def _mmlu_csv(rows: Rows) -> str:
    return _csv([row["question"], *row["choices"], LETTERS[row["answer"]]] for row in rows)


LAYOUTS: Mapping[str, Callable[[], list[HubFile]]] = {
    "ceval": _ceval,
    "mmlu": _mmlu,
    "mmlu_pro": _json_files(
        "TIGER-Lab/MMLU-Pro",
        {f"{split}.jsonl": ("default", split) for split in ("validation", "test")},
    ),
    "math500": _json_files("HuggingFaceH4/MATH-500", {"test.jsonl": ("default", "test")}),
    "ifeval": _json_files("google/IFEval", {"input_data.jsonl": ("default", "train")}),
}
