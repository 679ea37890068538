"""One data file to conversations: rows read, the layout told, each row converted or found to be bad."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glmtune.data.reading.layouts import Layout, convert, detect_layout, number_columns, read_columns
from glmtune.data.reading.message_items import unread_keys
from glmtune.data.reading.readers import read_rows
from glmtune.data.records import BadRow, Conversation, RowProblem, RowTable
from glmtune.data.settings import DataSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileRows:
    """What a file holds.

    Attributes:
        conversations: usable rows, in file order.
        bad: the others, in file order.
        path: the file or hub id.
        kind: see `glmtune.data.records.RowTable`.
        encoding: likewise.
        layout: the layout of all rows; None where none could be read.
        unused_columns: columns that occur but are not read, and keys of messages likewise.
        num_rows: rows that could be read, good or bad.
    """

    conversations: Sequence[Conversation]
    bad: Sequence[BadRow]
    path: str
    kind: str
    encoding: str
    layout: Layout | None
    unused_columns: tuple[str, ...]
    num_rows: int


def read_file(
    source: str, settings: DataSettings, split: str, *, limit: int | None, need_answers: bool
) -> FileRows:
    """Read the conversations of one file or hub data set.

    Args:
        source: from `glmtune.data.reading.sources.find_data_files`.
        settings: layout and columns.
        split: taken from a hub data set that names none.
        limit: rows looked at, at most.
        need_answers: whether rows without an answer are bad.

    Raises:
        DataError: the file cannot be read, or its layout cannot be told.
    """
    table = read_rows(
        source, split=split, hub_subset=settings.hub_subset, limit=limit, columns=read_columns(settings)
    )
    if not table.rows:  # the other files of a split, if there are any, may hold some
        return FileRows([], table.bad, table.path, table.kind, table.encoding, None, (), 0)
    # One layout for the file, told by its first rows: row by row, a single odd one would be read as something
    # it is not instead of being reported.
    layout = detect_layout(table.rows, settings, table.path, names=table.columns, need_answers=need_answers)
    conversations: list[Conversation] = []
    bad = list(table.bad)
    numbers: Counter[str] = Counter()
    for row in table.rows:
        try:
            messages = convert(layout, row.values, need_answer=need_answers)
            conversations.append(Conversation(messages, table.path, row.line))
        except RowProblem as problem:
            bad.append(BadRow(row.line, str(problem), problem.empty_answer))
        else:
            numbers.update(number_columns(layout, row.values))
    _tell_numbers(table.path, numbers)
    return FileRows(
        conversations,
        sorted(bad, key=lambda row: row.line),
        table.path,
        table.kind,
        table.encoding,
        layout,
        _unused_columns(table, layout),
        len(table.rows),
    )


def _unused_columns(table: RowTable, layout: Layout) -> tuple[str, ...]:
    columns = {*table.columns, *(name for row in table.rows for name in row.values)}
    keys = {key for row in table.rows for key in unread_keys(row.values.get(layout.prompt))}
    return (
        *sorted(columns - set(layout.columns)),
        *(f"{layout.prompt}[].{key}" for key in sorted(keys)),
    )


def _tell_numbers(path: str, numbers: Mapping[str, int]) -> None:
    if numbers:
        found = ", ".join(f"`{name}` in {count} rows" for name, count in numbers.items())
        _say_once(f"{path}: numbers and truth values are read as their text: {found}.")


@functools.cache
def _say_once(text: str) -> None:
    """Say what is true of a file however often it is read, as it is where rows are kept for evaluation."""
    logger.warning("%s", text)
