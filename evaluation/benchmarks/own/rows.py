"""The questions of a described benchmark: rows of JSON lines, JSON, CSV, TSV, Parquet, or of the hub."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.benchmarks.benchmark import json_lines, read_text
from glmtune.errors import DataError

HUB = "hub:"
WAY_OUT = "`files` names it relative to the YAML file."
FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One question as its file has it.

    Attributes:
        values: by column.
        line: where it begins in the file, from 1; None where the file has no lines.
    """

    values: Mapping[str, Any]
    line: int | None


def read_rows(folder: Path, name: str) -> list[Row]:
    """Read all rows of a file.

    Args:
        folder: of the YAML file.
        name: as in ``files``.

    Raises:
        DataError: it is absent, of another form, damaged, or has no rows.
    """
    path = folder / name
    if name.startswith(HUB):
        rows, path = [Row(values, None) for values in _of_hub(name, folder)], None
    elif path.suffix.lower() not in FORMS:
        raise DataError(f"it must end in {', '.join(FORMS)}, or be `{HUB}OWNER/NAME`.", path=path)
    else:
        rows = list(_READERS[path.suffix.lower()](path))
    if not rows:
        raise DataError(f"`{name}` has no questions.", path=path)
    return rows


def _of_json_lines(path: Path) -> Iterator[Row]:
    for line, values in json_lines(path, name="this benchmark", way_out=WAY_OUT):
        yield Row(values, line)


def _of_json(path: Path) -> Iterator[Row]:
    try:
        found = json.loads(read_text(path, name="this benchmark", way_out=WAY_OUT))
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON ({error}).", path=path) from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(
            "a list of objects was expected. One object in each line goes into a .jsonl.", path=path
        )
    for row in found:
        yield Row(row, None)


def _of_table(path: Path) -> Iterator[Row]:
    text = read_text(path, name="this benchmark", way_out=WAY_OUT)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"another number of cells than the {len(reader.fieldnames or ())} of the first line.",
                    path=path,
                    line=reader.line_num,
                )
            yield Row(row, reader.line_num)
    except csv.Error as error:
        raise DataError(f"no table ({error}).", path=path, line=reader.line_num) from None


def _of_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"no Parquet file that can be read ({str(error)[:120]}).", path=path) from None
    for row in rows:
        yield Row(row, None)


def _of_hub(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    import datasets

    place, *more = name.removeprefix(HUB).split(":")
    if "/" not in place or len(more) > 2:
        raise DataError(
            f"`{name}` must be `{HUB}OWNER/NAME`, with `:SPLIT` or `:CONFIG:SPLIT` behind it.", path=folder
        )
    config, split = more if len(more) == 2 else (None, *(more or ["test"]))
    try:
        found: Any = datasets.load_dataset(place, config, split=split)
    except Exception as error:  # of the hub's client, in many kinds
        raise DataError(
            f"`{name}` cannot be read from the hub ({type(error).__name__}: {str(error)[:200]}). Check name, "
            "split and connection, or download the file and name it."
        ) from error
    for row in found:
        yield dict(row)


_READERS = {
    ".jsonl": _of_json_lines,
    ".json": _of_json,
    ".csv": _of_table,
    ".tsv": _of_table,
    ".parquet": _of_parquet,
}
