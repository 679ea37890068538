"""One data file to conversations: rows read, the layout told, each row converted or found to be bad."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice

from glmtune.data.reading.layouts import (
    DETECTION_ROWS,
    Layout,
    convert,
    detect_layout,
    number_columns,
    read_columns,
)
from glmtune.data.reading.message_items import unread_keys
from glmtune.data.reading.preference import (
    Judged,
    convert_preference,
    detect_preference,
    preference_columns,
)
from glmtune.data.reading.readers import open_rows
from glmtune.data.reading.row_stream import RowStream
from glmtune.data.records import BadRow, Conversation, RawRow, RowProblem
from glmtune.data.settings import PREFERENCE, DataSettings

logger = logging.getLogger(__name__)


class FileReader:
    """The conversations of one file or hub data set, to be gone through once.

    What is said of the whole file is complete when they are at their end.

    Attributes:
        path: the file or hub id.
        kind: see `glmtune.data.records.RowTable`.
        encoding: likewise.
        layout: the layout of all rows; None where none could be read.
        bad: rows that cannot be used, so far.
        num_rows: rows that could be read, good or bad.
    """

    def __init__(
        self, source: str, settings: DataSettings, split: str, *, limit: int | None, need_answers: bool
    ) -> None:
        """Open the file.

        Args:
            source: from `glmtune.data.reading.sources.find_data_files`.
            settings: layout and columns.
            split: taken from a hub data set that names none.
            limit: rows looked at, at most.
            need_answers: whether rows without an answer are bad.

        Raises:
            DataError: the file cannot be read.
        """
        self._settings, self._need_answers = settings, need_answers
        self._judges = settings.layout == PREFERENCE
        self._stream: RowStream = open_rows(
            source,
            split=split,
            hub_subset=settings.hub_subset,
            limit=limit,
            columns=preference_columns(settings) if self._judges else read_columns(settings),
            hub_streaming=settings.streaming and split == "train",
        )
        self.path, self.kind, self.encoding = self._stream.path, self._stream.kind, self._stream.encoding
        self.layout: Layout | None = None
        self.bad: list[BadRow] = self._stream.bad
        self.num_rows = 0
        self._columns: set[str] = set()
        self._keys: set[str] = set()
        self._numbers: Counter[str] = Counter()

    @property
    def fraction(self) -> float:
        """How much of the file is read, from 0 to 1; 0 where that is not known."""
        return self._stream.fraction()

    def raw_rows(self) -> Iterator[RawRow]:
        """Yield the rows as the file holds them; the layout is told before the first one.

        Raises:
            DataError: the file cannot be read on, or its layout cannot be told.
        """
        # One layout for the file, told by its first rows: row by row, a single odd one would be read as
        # something it is not instead of being reported.
        first = list(islice(self._stream, DETECTION_ROWS))
        if first and self._judges:
            names = self._stream.columns
            self.layout = detect_preference(first, self._settings, self.path, names=names)
        elif first:  # the other files of a split, if there are any, may hold some
            self.layout = detect_layout(
                first,
                self._settings,
                self.path,
                names=self._stream.columns,
                need_answers=self._need_answers,
            )
        yield from chain(first, self._stream)

    def conversation(self, row: RawRow) -> Conversation | None:
        """Convert a row; None where it cannot be used, and then it is counted among the bad ones."""
        assert self.layout is not None
        self.num_rows += 1
        self._columns.update(row.values)
        self._keys |= unread_keys(row.values.get(self.layout.prompt))
        try:
            if self._judges:
                found = convert_preference(self.layout, row.values, need_answer=self._need_answers)
            else:
                found = Judged(convert(self.layout, row.values, need_answer=self._need_answers))
        except RowProblem as problem:
            self.bad.append(BadRow(row.line, str(problem), problem.empty_answer))
            return None
        self._numbers.update(number_columns(self.layout, row.values))
        return Conversation(
            found.messages, self.path, row.line, rejected=found.rejected, desirable=found.desirable
        )

    def __iter__(self) -> Iterator[Conversation]:
        """Yield the conversations in the order of the file.

        Raises:
            DataError: see `raw_rows`.
        """
        for row in self.raw_rows():
            conversation = self.conversation(row)
            if conversation is not None:
                yield conversation
        self.bad.sort(key=lambda row: row.line)
        _tell_numbers(self.path, self._numbers)

    @property
    def unused_columns(self) -> tuple[str, ...]:
        """Columns that occur but are not read, and keys of messages likewise."""
        if self.layout is None:
            return ()
        columns = {*self._stream.columns, *self._columns} - set(self.layout.columns)
        return (*sorted(columns), *(f"{self.layout.prompt}[].{key}" for key in sorted(self._keys)))


def _tell_numbers(path: str, numbers: Mapping[str, int]) -> None:
    if numbers:
        found = ", ".join(f"`{name}` in {count} rows" for name, count in numbers.items())
        _say_once(f"{path}: numbers and truth values are read as their text: {found}.")


@functools.cache
def _say_once(text: str) -> None:
    """Say what is true of a file however often it is read, as it is where rows are kept for evaluation."""
    logger.warning("%s", text)
