"""Read the rows of a data file or hub data set, each with its line."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from glmtune.data.reading.decoding import decode_text
from glmtune.data.reading.json_rows import parse_json_rows
from glmtune.data.records import BadRow, RawRow, RowTable
from glmtune.errors import DataError

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.%:\[\]+-]+))?")
_LONGEST_CELL = 1 << 27  # characters; the csv module stops at 131072 on its own


def is_hub_id(source: str) -> bool:
    """Say whether a source that is no existing file reads as ``owner/name`` or ``owner/name:split``.

    >>> is_hub_id("owner/name:validation"), is_hub_id("data/train.json"), is_hub_id("/data/train")
    (True, False, False)
    """
    match = _HUB_ID.fullmatch(source)
    return match is not None and not match["id"].lower().endswith(_SUFFIXES)


def read_rows(source: str | Path, *, split: str = "train", hub_subset: str | None = None) -> RowTable:
    """Read a data file or hub data set.

    The content decides between JSON array and JSON Lines; tables are told by their extension.
    Code from the hub is never executed.

    Args:
        source: a file, or ``owner/name[:split]`` on the hub where no such file exists.
        split: split taken from a hub data set when the source names none.
        hub_subset: subset (configuration) of a hub data set.

    Returns:
        The rows; rows that could not be read are listed as bad, not raised.

    Raises:
        DataError: nothing is there, it is a folder, empty, in an unknown encoding, or unreadable as a whole.
    """
    # A file wins over a hub id of the same form, and so does a folder: `data/rows` with a missing file is a
    # typing error to be reported, not a reason to ask the hub.
    path = Path(source)
    if not path.exists() and is_hub_id(str(source)) and not path.parent.is_dir():
        return _read_hub(str(source), split, hub_subset)
    _check_file(path)
    reader = _BINARY_READERS.get(path.suffix.lower())
    if reader is not None:
        return reader(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}. Check its permissions.", path=path
        ) from None
    decoded = decode_text(raw, str(path))
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        rows, bad = _parse_table(decoded.text, str(path), "\t" if suffix == ".tsv" else ",")
        return RowTable(rows, bad, str(path), suffix[1:], decoded.encoding)
    parsed = parse_json_rows(decoded.text, str(path))
    return RowTable(parsed.rows, parsed.bad, str(path), parsed.kind, decoded.encoding)


def _check_file(path: Path) -> None:
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        inside = f"It holds: {', '.join(files[:10])}." if files else "It holds no data files."
        raise DataError(
            f"this is a folder, but one file is needed. {inside} Name one of its files.", path=path
        )
    if path.is_file():
        return
    raise DataError(f"there is no such file.{nearest_files(path)}", path=path)


def nearest_files(path: Path) -> str:
    """Offer what lies near a missing file.

    Args:
        path: the missing file.

    Returns:
        A sentence (with a leading blank) naming similar files of its folder, or the first folder missing.
    """
    folder = path.parent
    if not folder.is_dir():
        missing = folder
        while not missing.parent.is_dir():
            missing = missing.parent
        return f" The folder {missing} does not exist either (working folder: {Path.cwd()})."
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    near += [name for name in names if Path(name).suffix.lower() in _SUFFIXES and name not in near][
        : 3 - len(near)
    ]
    return (
        f" Nearest files in {folder}: {', '.join(near)}."
        if near
        else f" The folder {folder} holds no data files."
    )


def _parse_table(text: str, path: str, delimiter: str) -> tuple[list[RawRow], list[BadRow]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[RawRow] = []
    bad: list[BadRow] = []
    header = next(reader, [])
    _check_header(header, path)
    # `line_num` is where the last row ended; a quoted cell may hold line breaks, so the next one starts
    # behind it.
    line = reader.line_num + 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(
                f"no valid table ({error}) in the row that starts here. A cell that holds commas, quotes or"
                ' line breaks stands in double quotes, with quotes inside it doubled ("").',
                path=path,
                line=line,
            ) from None
        if cells and len(cells) != len(header):
            problem = f"{len(cells)} cells, but the header has {len(header)}. Quote cells that hold commas."
            bad.append(BadRow(line, problem))
        elif cells:
            rows.append(RawRow(dict(zip(header, cells, strict=True)), line))
        line = reader.line_num + 1
    if not rows and not bad:
        raise DataError("the file has a header but no rows. A data file needs at least one row.", path=path)
    return rows, bad


def _check_header(header: list[str], path: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"the column `{twice[0]}` occurs twice in the header. Rename one.", path=path, line=1)


def _read_parquet(path: Path) -> RowTable:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        rows = [
            RawRow(values, number)
            for number, values in enumerate(_batched_rows(table), start=1)  # row groups stream through
        ]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"no valid Parquet file: {error}. Copy or download it again.", path=path) from None
    if not rows:
        raise DataError("the file holds no rows. A data file needs at least one row.", path=path)
    return RowTable(rows, [], str(path), "parquet", "")


def _batched_rows(table: object) -> Iterator[dict[str, object]]:
    for batch in table.iter_batches():  # pyright: ignore[reportAttributeAccessIssue]
        yield from batch.to_pylist()


_BINARY_READERS: dict[str, Callable[[Path], RowTable]] = {".parquet": _read_parquet}


def _read_hub(source: str, split: str, subset: str | None) -> RowTable:
    import datasets

    match = _HUB_ID.fullmatch(source)
    assert match is not None
    name, split = match["id"], match["split"] or split
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"`{source}` is no file here, and taken as a hub data set (split `{split}`, subset"
            f" {subset or 'default'}) it cannot be loaded: {_first_line(error)} Check the name and split"
            " (`owner/name:split`), `data.hub_subset` and the network, or give a file.",
        ) from None
    rows = [
        RawRow(values, number) for number, values in enumerate(loaded, start=1) if isinstance(values, dict)
    ]
    if not rows:
        raise DataError(f"the hub data set `{source}` (split `{split}`) holds no rows. Choose another split.")
    return RowTable(rows, [], f"{name}:{split}", "hub", "")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if line.endswith((".", "!", "?")) else line + "."
