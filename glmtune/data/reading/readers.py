"""Read the rows of a data file or hub data set, each with its line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from glmtune.data.reading.archives import ZIP, archive_of, members
from glmtune.data.reading.parquet_rows import first_line, open_parquet
from glmtune.data.reading.row_stream import RowStream
from glmtune.data.reading.text_rows import open_text
from glmtune.data.records import RawRow, RowTable
from glmtune.errors import DataError

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""Of data files, told by them from what else lies in a folder."""
_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".txt", ".gz", ZIP)
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.%:\[\]+-]+))?")


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
    """Read a data file or hub data set as a whole, as `open_rows` does row by row."""
    stream = open_rows(source, split=split, hub_subset=hub_subset, limit=limit, columns=columns)
    rows = list(stream)
    return RowTable(rows, stream.bad, stream.path, stream.kind, stream.encoding, stream.columns)


def open_rows(
    source: str | Path,
    *,
    split: str = "train",
    hub_subset: str | None = None,
    limit: int | None = None,
    columns: Collection[str] | None = None,
    hub_streaming: bool = False,
) -> RowStream:
    """Open a data file or hub data set.

    The content decides between JSON array and JSON Lines; tables are told by their extension.
    Code from the hub is never executed.

    Args:
        source: a file, plain or packed by gzip, a file in a zip archive (``rows.zip/train.jsonl``), or
            ``owner/name[:split]`` on the hub where no such file exists.
        split: split taken from a hub data set when the source names none.
        hub_subset: subset (configuration) of a hub data set.
        limit: stop after so many rows that can be read: neither time nor memory is spent on the rest.
        columns: of a table (CSV, Parquet), keep only these; None keeps all.
        hub_streaming: fetch rows of the hub as they are asked for, instead of the whole set first.

    Returns:
        The rows; rows that could not be read are listed as bad, not raised.

    Raises:
        DataError: nothing is there, it is a folder, empty, in an unknown encoding, or unreadable as a whole;
            some of it shows only while rows are read.
    """
    path = Path(source)
    if is_on_hub(source):
        return _open_hub(str(source), split, hub_subset, limit, streaming=hub_streaming)
    if archive_of(path) is None:
        _check_file(path)
    try:
        if path.suffix.lower() == ".parquet":
            return open_parquet(path, limit, columns)
        stream = open_text(path, limit, columns)
    except OSError as error:
        raise unreadable(path, error) from None
    stream.rows = islice(_readable(stream.rows, path), limit)
    return stream


def is_on_hub(source: str | Path) -> bool:
    """Say whether a source means a data set of the hub."""
    # A file wins over a hub id of the same form, and so does a folder: `data/rows` with a missing file is a
    # typing error to be reported, not a reason to ask the hub.
    path = Path(source)
    return not path.exists() and is_hub_id(str(source)) and not path.parent.is_dir()


def _readable(rows: Iterator[RawRow], path: Path) -> Iterator[RawRow]:
    try:
        yield from rows
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """Word that the system does not give a file."""
    return DataError(f"the file cannot be read: {error.strerror}. Check its permissions.", path=path)


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


def _open_hub(
    source: str, split: str, subset: str | None, limit: int | None, *, streaming: bool
) -> RowStream:
    name, split, loaded = load_hub(source, split, subset, streaming=streaming)
    stream = RowStream(f"{name}:{split}", "hub")

    def rows() -> Iterator[RawRow]:
        number = 0
        for number, values in enumerate(islice(loaded, limit), start=1):
            if isinstance(values, dict):
                yield RawRow(values, number)
        if not number:
            raise DataError(
                f"the hub data set `{source}` (split `{split}`) holds no rows. Choose another split."
            )

    stream.rows = rows()
    return stream


def load_hub(source: str, split: str, subset: str | None, *, streaming: bool = False) -> tuple[str, str, Any]:
    """Load a data set of the hub; code of it is never executed.

    Args:
        source: ``owner/name[:split]``.
        split: taken where the source names none.
        subset: configuration, if any.
        streaming: fetch rows as they are asked for.

    Returns:
        Name, split, and the `datasets.Dataset`, or `datasets.IterableDataset` if it is streamed.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    match = _HUB_ID.fullmatch(source)
    assert match is not None
    name, split = match["id"], match["split"] or split
    how: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        return name, split, datasets.load_dataset(name, subset, split=split, **how)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"`{source}` is no file here, and taken as a hub data set (split `{split}`, subset"
            f" {subset or 'default'}) it cannot be loaded: {first_line(error)} Check the name and split"
            " (`owner/name:split`), `data.hub_subset` and the network, or give a file.",
        ) from None
