"""Read the rows of a data file or hub data set, each with its line."""

from __future__ import annotations

import csv
import difflib
import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from glmtune.data.reading.archives import (
    MIN_BYTES_READ,
    MOST_UNPACKED_TIMES,
    ZIP,
    archive_of,
    data_suffix,
    members,
    read_packed,
)
from glmtune.data.reading.decoding import decode_text
from glmtune.data.reading.json_rows import parse_json_rows
from glmtune.data.reading.json_values import clipped
from glmtune.data.records import BadRow, RawRow, RowTable
from glmtune.errors import DataError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""Of data files, told by them from what else lies in a folder."""
_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".txt", ".gz", ZIP)
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.%:\[\]+-]+))?")
_LONGEST_CELL = 1 << 27  # characters; the csv module stops at 131072 on its own
_PREFIX_BYTES = 1 << 20
"""Read of a text file first where only its first rows are wanted, then four times as much, and so on."""

# A Parquet file of a few kilobytes may stand for any number of equal rows and texts.
_BATCH_ROWS = 256
_MIN_ROWS_READ, _MIN_BYTES_READ = 1_000_000, MIN_BYTES_READ


def is_hub_id(source: str) -> bool:
    """Say whether a source that is no existing file reads as ``owner/name`` or ``owner/name:split``.

    >>> is_hub_id("owner/name:validation"), is_hub_id("data/train.json"), is_hub_id("/data/train")
    (True, False, False)
    """
    match = _HUB_ID.fullmatch(source)
    return match is not None and not match["id"].lower().endswith(_SUFFIXES)


def read_rows(
    source: str | Path,
    *,
    split: str = "train",
    hub_subset: str | None = None,
    limit: int | None = None,
    columns: Collection[str] | None = None,
) -> RowTable:
    """Read a data file or hub data set.

    The content decides between JSON array and JSON Lines; tables are told by their extension.
    Code from the hub is never executed.

    Args:
        source: a file, plain or packed by gzip, a file in a zip archive (``rows.zip/train.jsonl``), or
            ``owner/name[:split]`` on the hub where no such file exists.
        split: split taken from a hub data set when the source names none.
        hub_subset: subset (configuration) of a hub data set.
        limit: stop after so many rows that can be read: neither time nor memory is spent on the rest.
        columns: of a table (CSV, Parquet), keep only these; None keeps all.

    Returns:
        The rows; rows that could not be read are listed as bad, not raised.

    Raises:
        DataError: nothing is there, it is a folder, empty, in an unknown encoding, or unreadable as a whole.
    """
    # A file wins over a hub id of the same form, and so does a folder: `data/rows` with a missing file is a
    # typing error to be reported, not a reason to ask the hub.
    path = Path(source)
    if not path.exists() and is_hub_id(str(source)) and not path.parent.is_dir():
        return _read_hub(str(source), split, hub_subset, limit)
    if archive_of(path) is None:
        _check_file(path)
    reader = _BINARY_READERS.get(path.suffix.lower())
    try:
        return (reader or _read_text)(path, limit, columns)
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}. Check its permissions.", path=path
        ) from None


def _read_text(path: Path, limit: int | None, columns: Collection[str] | None) -> RowTable:
    """Read a text file: as a whole or, where few rows are wanted, as much of its beginning as holds them."""
    packed = archive_of(path) is not None or path.suffix.lower() == ".gz"
    size = 0 if packed else path.stat().st_size
    num_bytes = size if limit is None else min(size, _PREFIX_BYTES)
    while num_bytes < size:
        assert limit is not None
        with path.open("rb") as file:
            beginning = _whole_lines(file.read(num_bytes))
        # What is wrong in a beginning may be no more than that it ends: the whole file will tell.
        with suppress(DataError):
            table = _parse_text(beginning, path, limit, columns)
            if len(table.rows) == limit:
                _warn_of_encoding(table)
                return table
        num_bytes *= 4
    table = _parse_text(read_packed(path), path, limit, columns)
    _warn_of_encoding(table)
    return table


def _whole_lines(raw: bytes) -> bytes:
    """Drop the last line, which may be cut; a single line stays, up to its last whole character."""
    end = max(raw.rfind(b"\n"), raw.rfind(b"\r")) + 1
    return raw[:end] if end else raw.decode("utf-8", "ignore").encode()


def _warn_of_encoding(table: RowTable) -> None:
    if table.encoding == "gb18030":
        logger.warning("%s is not UTF-8; read as GB18030. Convert it to UTF-8 to silence this.", table.path)


def _parse_text(raw: bytes, path: Path, limit: int | None, columns: Collection[str] | None) -> RowTable:
    decoded = decode_text(raw, str(path))
    suffix = data_suffix(path)
    if suffix in (".csv", ".tsv"):
        delimiter = "\t" if suffix == ".tsv" else ","
        rows, bad, header = _parse_table(decoded.text, str(path), delimiter, limit, columns)
        return RowTable(rows, bad, str(path), suffix[1:], decoded.encoding, header)
    parsed = parse_json_rows(decoded.text, str(path), limit)
    return RowTable(parsed.rows, parsed.bad, str(path), parsed.kind, decoded.encoding)


def _check_file(path: Path) -> None:
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        inside = f"It holds: {', '.join(files[:10])}." if files else "It holds no data files."
        raise DataError(
            f"this is a folder, but one file is needed. {inside} Name one of its files.", path=path
        )
    if path.suffix.lower() == ZIP and path.is_file():
        raise DataError(
            "this is an archive, but one file is needed. Name one of its files, such as"
            f" {path}/{next(iter(members(path)), 'train.jsonl')}.",
            path=path,
        )
    if path.is_file():
        return
    if path.exists():
        raise DataError(
            "this is a pipe or a device, which may never end and cannot be read twice. Write its content to a"
            " file.",
            path=path,
        )
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


def _parse_table(
    text: str, path: str, delimiter: str, limit: int | None, columns: Collection[str] | None
) -> tuple[list[RawRow], list[BadRow], tuple[str, ...]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[RawRow] = []
    bad: list[BadRow] = []
    header = next(reader, [])
    _check_header(header, path, line=1)
    # Spreadsheets write columns without a name and rows without a cell where something once stood.
    width = len(header)
    kept = [(p, name) for p, name in enumerate(header) if name and (columns is None or name in columns)]
    unnamed = [place for place, name in enumerate(header) if not name]
    unnamed_hold_text = False
    # `line_num` is where the last row ended; a quoted cell may hold line breaks, so the next one starts
    # behind it.
    line = reader.line_num + 1
    while len(rows) != limit:
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
        is_blank = not any(cells) and len(cells) != 1
        while len(cells) > width and not cells[-1]:
            del cells[-1]
        if len(cells) != width and not is_blank:
            problem = f"{len(cells)} cells, but the header has {width}. Quote cells that hold commas."
            bad.append(BadRow(line, problem))
        elif not is_blank:
            rows.append(RawRow({name: cells[place] for place, name in kept}, line))
            unnamed_hold_text = unnamed_hold_text or any(cells[place] for place in unnamed)
        line = reader.line_num + 1
    if not rows and not bad:
        raise DataError("the file has a header but no rows. A data file needs at least one row.", path=path)
    return rows, bad, tuple(name for name in header if name) + ("",) * unnamed_hold_text


def _check_header(header: Sequence[str], path: str | Path, line: int | None) -> None:
    twice = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if twice:
        raise DataError(
            f"the column `{clipped(twice[0])}` occurs twice in the header. Rename one.", path=path, line=line
        )


def _read_parquet(path: Path, limit: int | None, columns: Collection[str] | None) -> RowTable:
    import pyarrow
    import pyarrow.parquet

    rows: list[RawRow] = []
    try:
        # Pages stream through the buffer: otherwise a whole group of rows is read, perhaps all there are.
        table = pyarrow.parquet.ParquetFile(path, buffer_size=_PREFIX_BYTES)
        names = tuple(str(name) for name in table.schema_arrow.names)
        _check_header(names, path, line=None)
        kept = [name for name in names if columns is None or name in columns]
        unpacked = _unpacked(table, kept, path, min(_BATCH_ROWS, limit or _BATCH_ROWS))
        for values in islice(unpacked, limit):
            rows.append(RawRow(values, len(rows) + 1))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two come from values that Python has no form for: bytes that are no text, the year 300000.
        raise DataError(
            f"no valid Parquet file: {_first_line(error)} Copy or download it again.",
            path=path,
            line=len(rows) + 1 if rows else None,
        ) from None
    if not rows:
        raise DataError("the file holds no rows. A data file needs at least one row.", path=path)
    return RowTable(rows, [], str(path), "parquet", "", names)


def _unpacked(table: Any, columns: list[str], path: Path, batch_size: int) -> Iterator[dict[str, object]]:
    """Yield rows as they are unpacked, within bounds that follow from the file's size."""
    size = path.stat().st_size
    most_rows, most_bytes = max(_MIN_ROWS_READ, size), max(_MIN_BYTES_READ, MOST_UNPACKED_TIMES * size)
    num_rows = num_bytes = 0
    for batch in table.iter_batches(batch_size=batch_size, columns=columns):
        num_rows += batch.num_rows
        num_bytes += batch.nbytes
        if num_rows > most_rows or num_bytes > most_bytes:
            raise DataError(
                f"the {size} bytes of this file unpack to more than {most_rows} rows or {most_bytes} bytes,"
                " the most that is read of a file of this size. Write its rows as JSON Lines, or fewer.",
                path=path,
            )
        yield from _as_written(batch).to_pylist()


def _as_written(batch: Any) -> Any:
    """Return the rows with short floats as their shortest text says: 0.1, not 0.10000000149011612."""
    import pyarrow as pa

    for place, field in enumerate(batch.schema):
        if field.type in (pa.float32(), pa.float16()):
            column = batch.column(place).cast(pa.float32()).cast(pa.string()).cast(pa.float64())
            batch = batch.set_column(place, field.name, column)
    return batch


_BINARY_READERS: dict[str, Callable[[Path, int | None, Collection[str] | None], RowTable]] = {
    ".parquet": _read_parquet
}


def _read_hub(source: str, split: str, subset: str | None, limit: int | None) -> RowTable:
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
        RawRow(values, number)
        for number, values in enumerate(islice(loaded, limit), start=1)
        if isinstance(values, dict)
    ]
    if not rows:
        raise DataError(f"the hub data set `{source}` (split `{split}`) holds no rows. Choose another split.")
    return RowTable(rows, [], f"{name}:{split}", "hub", "")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if line.endswith((".", "!", "?")) else line + "."
