"""Load a split: rows read, checked, encoded, and kept compactly for the trainer."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from glmtune.data.encode import EncodedRow, encode_training_row
from glmtune.data.reading.layouts import Layout, convert, detect_layout
from glmtune.data.reading.readers import read_rows
from glmtune.data.reading.sources import find_data_file
from glmtune.data.records import BadRow, Conversation, RowProblem, bad_rows_error, rows_fingerprint
from glmtune.data.settings import DataSettings
from glmtune.labels import IGNORE_INDEX
from glmtune.models.templates.renderer import TextTokenizer

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

_ROWS_PER_TABLE = 50_000  # of up to some thousand tokens: far from 2**31, the limit of 32-bit offsets


@dataclass(frozen=True, slots=True)
class ConversationSet:
    """The conversations of one split.

    Attributes:
        conversations: usable rows, in file order.
        split: ``train``, ``validation`` or ``test``.
        path: the file or hub id.
        kind: ``json``, ``jsonl``, ``csv``, ``tsv``, ``parquet`` or ``hub``.
        encoding: text encoding found, empty for binary sources.
        layout: the layout they were read with.
        unused_columns: columns that occur in the file but are not read.
        bad: rows left out (only with ``on_bad_row="skip"``).
        fingerprint: sha256 of all messages, independent of file format and layout.
    """

    conversations: Sequence[Conversation]
    split: str
    path: str
    kind: str
    encoding: str
    layout: Layout
    unused_columns: tuple[str, ...]
    bad: Sequence[BadRow]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class TruncationCounts:
    """How many rows lost something, and how much.

    Attributes:
        rows_with_dropped_turns: rows whose oldest turns were left out.
        rows_with_cut_question: rows whose current question was cut at its end.
        rows_with_cut_answer: rows whose answer was cut at its end.
        dropped_turns: turns left out, over all rows.
        cut_question_tokens: question tokens cut, over all rows.
        cut_answer_tokens: answer tokens cut, over all rows.
    """

    rows_with_dropped_turns: int = 0
    rows_with_cut_question: int = 0
    rows_with_cut_answer: int = 0
    dropped_turns: int = 0
    cut_question_tokens: int = 0
    cut_answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """A split ready for training.

    Attributes:
        rows: columns ``input_ids``, ``labels`` (int32 lists) and ``length`` (tokens, for length grouping).
        lengths: the column ``length`` as int32 ``[rows]``.
        num_conversations: conversations behind the rows.
        num_tokens: tokens of all rows.
        num_loss_tokens_per_row: tokens that carry loss, int32 ``[rows]``.
        truncation: what was cut.
        bad: rows left out (only with ``on_bad_row="skip"``).
        fingerprint: of the conversations, see `ConversationSet`.
        path: the file or hub id.
        split: ``train``, ``validation`` or ``test``.
    """

    rows: datasets.Dataset
    lengths: np.ndarray
    num_conversations: int
    num_tokens: int
    num_loss_tokens_per_row: np.ndarray
    truncation: TruncationCounts
    bad: Sequence[BadRow]
    fingerprint: str
    path: str
    split: str

    @property
    def num_loss_tokens(self) -> int:
        """Tokens of all rows that carry loss."""
        return int(self.num_loss_tokens_per_row.sum())


def load_conversations(
    settings: DataSettings, split: str, *, need_answers: bool = True, warn: bool = True
) -> ConversationSet:
    """Read the conversations of a split, without tokenizing them.

    Args:
        settings: the data settings.
        split: ``train``, ``validation`` or ``test``.
        need_answers: whether rows without an answer are bad (training) or questions to answer (prediction).
        warn: log how many rows are left out.

    Returns:
        The conversations; at most ``max_*_samples`` rows of the file are looked at.

    Raises:
        ConfigError: no file is given for the split.
        DataError: the file cannot be read, has no usable row, or (with ``on_bad_row="error"``) bad rows; all
            of them are reported together.
    """
    source = find_data_file(settings, split)
    table = read_rows(source, split=split, hub_subset=settings.hub_subset)
    limit = settings.max_samples_of(split)
    rows, bad = table.rows, list(table.bad)
    if limit is not None and limit < len(rows):
        # Bad rows behind the last row looked at are not this run's; those before it are.
        rows = rows[:limit]
        bad = [row for row in bad if row.line < rows[-1].line]
    total = len(rows) + len(bad)
    if not rows:
        raise bad_rows_error(table.path, bad, total)
    # One layout for the file, told by its first rows: row by row, a single odd one would be read as something
    # it is not instead of being reported.
    layout = detect_layout(rows, settings, table.path)
    conversations: list[Conversation] = []
    for row in rows:
        try:
            messages = convert(layout, row.values, need_answer=need_answers)
            conversations.append(Conversation(messages, table.path, row.line))
        except RowProblem as problem:
            bad.append(BadRow(row.line, str(problem), problem.empty_answer))
    _refuse_bad_rows(bad, len(conversations), total, table.path, settings)
    if warn:
        _warn_of_bad_rows(bad, total, table.path)
    columns = {name for row in rows for name in row.values}
    return ConversationSet(
        conversations=conversations,
        split=split,
        path=table.path,
        kind=table.kind,
        encoding=table.encoding,
        layout=layout,
        unused_columns=tuple(sorted(columns - set(layout.columns))),
        bad=bad,
        fingerprint=rows_fingerprint(conversations),
    )


def load_split(
    settings: DataSettings, split: str, tokenizer: TextTokenizer, *, progress: bool = False
) -> EncodedSplit:
    """Read and encode a split for training.

    Args:
        settings: the data settings.
        split: ``train``, ``validation`` or ``test``.
        tokenizer: a GLM tokenizer; it decides the template.
        progress: show a progress bar on the error stream.

    Returns:
        The encoded rows.

    Raises:
        ConfigError: no file is given for the split.
        DataError: as `load_conversations`; also rows that cannot be made to fit the lengths.
    """
    loaded = load_conversations(settings, split, warn=False)
    encoded = encode_conversations(loaded, tokenizer, settings, progress=progress)
    _warn_of_bad_rows(encoded.bad, encoded.num_conversations + len(encoded.bad), encoded.path)
    return encoded


def encode_conversations(
    loaded: ConversationSet, tokenizer: TextTokenizer, settings: DataSettings, *, progress: bool = False
) -> EncodedSplit:
    """Encode conversations for training.

    Args:
        loaded: from `load_conversations`, every row with an answer.
        tokenizer: a GLM tokenizer; it decides the template.
        settings: the data settings.
        progress: show a progress bar on the error stream.

    Returns:
        The encoded rows.

    Raises:
        DataError: rows that cannot be made to fit the lengths or the template.
    """
    buffer = _RowBuffer()
    bad: list[BadRow] = []
    for conversation in _with_progress(loaded.conversations, f"encoding {loaded.split}", progress):
        try:
            encoded = encode_training_row(tokenizer, conversation, settings)
        except RowProblem as problem:
            bad.append(BadRow(conversation.line, str(problem)))
            continue
        buffer.count(encoded)
        for row in encoded:
            buffer.add(row)
    total = len(loaded.conversations)
    _refuse_bad_rows(bad, total - len(bad), total, loaded.path, settings)
    return EncodedSplit(
        rows=buffer.dataset(),
        lengths=np.frombuffer(buffer.lengths, dtype=np.int32),
        num_conversations=total - len(bad),
        num_tokens=sum(buffer.lengths),
        num_loss_tokens_per_row=np.frombuffer(buffer.num_loss_tokens, dtype=np.int32),
        truncation=TruncationCounts(**buffer.truncation),
        bad=[*loaded.bad, *bad],
        fingerprint=loaded.fingerprint,
        path=loaded.path,
        split=loaded.split,
    )


def _refuse_bad_rows(bad: list[BadRow], num_good: int, total: int, path: str, settings: DataSettings) -> None:
    bad.sort(key=lambda row: row.line)
    if bad and (settings.on_bad_row == "error" or not num_good):
        raise bad_rows_error(path, bad, total)


def _warn_of_bad_rows(bad: Sequence[BadRow], total: int, path: str) -> None:
    if bad:
        logger.warning(
            "%s: %d of %d rows left out (data.on_bad_row=skip); the first, line %d: %s",
            path, len(bad), total, bad[0].line, bad[0].problem,
        )  # fmt: skip


def _with_progress(
    conversations: Sequence[Conversation], title: str, progress: bool
) -> Iterable[Conversation]:
    if not progress:
        return conversations
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(conversations, title, console=console, transient=True, disable=not console.is_terminal)


@dataclass(slots=True)
class _RowBuffer:
    """Rows as flat 32-bit arrays: a fifth of the memory of Python lists.

    Arrow tables take such arrays without a copy, so a split is never held as lists, and forked or spawned
    loader processes share it. The digest names the data set for `datasets`' cache without hashing everything
    again.
    """

    input_ids: array[int] = field(default_factory=lambda: array("i"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    tables: list[pyarrow.Table] = field(default_factory=list)
    num_loss_tokens: array[int] = field(default_factory=lambda: array("i"))
    num_flushed: int = 0
    truncation: dict[str, int] = field(default_factory=dict)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, row: EncodedRow) -> None:
        self.input_ids.extend(row.input_ids)
        self.labels.extend(row.labels)
        self.lengths.append(len(row.input_ids))
        self.num_loss_tokens.append(len(row.labels) - row.labels.count(IGNORE_INDEX))
        if len(self.lengths) - self.num_flushed == _ROWS_PER_TABLE:
            self._flush()

    def count(self, rows: Iterable[EncodedRow]) -> None:
        for row in rows:
            for name, total, amount in (
                ("rows_with_dropped_turns", "dropped_turns", row.dropped_turns),
                ("rows_with_cut_question", "cut_question_tokens", row.cut_question_tokens),
                ("rows_with_cut_answer", "cut_answer_tokens", row.cut_answer_tokens),
            ):
                self.truncation[name] = self.truncation.get(name, 0) + (amount > 0)
                self.truncation[total] = self.truncation.get(total, 0) + amount

    def _flush(self) -> None:
        import pyarrow as pa

        lengths = np.frombuffer(self.lengths, dtype=np.int32)[self.num_flushed :].copy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        columns = {
            name: pa.ListArray.from_arrays(offsets, pa.array(np.frombuffer(values, dtype=np.int32)))
            for name, values in (("input_ids", self.input_ids), ("labels", self.labels))
        }
        self.tables.append(pa.table({**columns, "length": pa.array(lengths)}))
        for values in (lengths, self.input_ids, self.labels):
            self.digest.update(values.tobytes())
        # New arrays, not cleared ones: the table just made reads the old ones in place. `lengths` is kept for
        # the sampler, so its share was copied above.
        self.num_flushed = len(self.lengths)
        self.input_ids, self.labels = array("i"), array("i")

    def dataset(self) -> datasets.Dataset:
        """Return all rows as a `datasets.Dataset` held in memory."""
        import datasets
        import pyarrow as pa

        if self.num_flushed < len(self.lengths):
            self._flush()
        return datasets.Dataset(pa.concat_tables(self.tables), fingerprint=self.digest.hexdigest()[:16])
