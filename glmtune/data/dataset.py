"""Load a split: rows read, checked, encoded, and kept compactly for the trainer."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from glmtune.data.divide import divide
from glmtune.data.encode import EncodedRow, encode_training_row
from glmtune.data.lengths import has_lengths, resolve_lengths, training_lengths
from glmtune.data.reading.layouts import Layout
from glmtune.data.reading.sources import described_files, find_data_files
from glmtune.data.reading.tables import FileRows, read_file
from glmtune.data.records import BadRow, Conversation, RowProblem, bad_rows_error, rows_fingerprint
from glmtune.data.settings import DataSettings
from glmtune.data.truncation import TruncationCounts, Unseen
from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX
from glmtune.messages import Message
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
        path: the file or hub id; of several, the first and how many more.
        kind: ``json``, ``jsonl``, ``csv``, ``tsv``, ``parquet`` or ``hub``; of several files, all.
        encoding: text encoding found, empty for binary sources; of several files, all.
        layout: the layout they were read with; of several files, what is read in any.
        unused_columns: columns that occur in the file but are not read, and keys of messages likewise.
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
        unused_columns: see `ConversationSet`.
        settings: they were encoded with, the lengths that the data told in place.
        system: the system message that all rows have, None where they have none or several.
        is_chat: whether rows have questions; False: they are plain text.
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
    unused_columns: tuple[str, ...]
    settings: DataSettings
    system: str | None
    is_chat: bool

    @property
    def unseen(self) -> Unseen:
        """What of the rows is not learnt from."""
        return Unseen(len(self.lengths), self.truncation, self.unused_columns, len(self.bad))

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
        The conversations, file by file; at most ``max_*_samples`` rows of them are looked at.

    Raises:
        ConfigError: no file is given for the split, or the training rows cannot be divided as asked.
        DataError: the file cannot be read, has no usable row, or (with ``on_bad_row="error"``) bad rows; all
            of them are reported together.
    """
    part = settings.part_of_training_rows(split)
    limit = settings.max_samples_of("train" if part else split)
    files: list[FileRows] = []
    for source in find_data_files(settings, split):
        left = None if limit is None else limit - sum(file.num_rows for file in files)
        if left == 0:
            break
        # Rows that training cannot use are none to divide either, whoever asks for their questions.
        answers = need_answers or part is not None
        files.append(read_file(source, settings, split, limit=left, need_answers=answers))
    path = described_files(file.path for file in files)
    conversations = [
        replace(item, messages=_with_system(item.messages, settings.system))
        for file in files
        for item in file.conversations
    ]
    bad = [replace(row, path="" if len(files) == 1 else file.path) for file in files for row in file.bad]
    total = len(conversations) + len(bad)
    _refuse_bad_rows(bad, len(conversations), total, path, settings)
    if part is not None:
        conversations, bad = _part(conversations, bad, part, settings, split)
    if warn:
        _warn_of_bad_rows(bad, total, path)
    return ConversationSet(
        conversations=conversations,
        split=split,
        path=path,
        kind=" and ".join(dict.fromkeys(file.kind for file in files)),
        encoding=" and ".join(dict.fromkeys(file.encoding for file in files if file.encoding)),
        layout=_joined_layout([file.layout for file in files if file.layout is not None]),
        unused_columns=tuple(dict.fromkeys(name for file in files for name in file.unused_columns)),
        bad=bad,
        fingerprint=rows_fingerprint(conversations),
    )


def _part(
    conversations: list[Conversation], bad: list[BadRow], part: str, settings: DataSettings, split: str
) -> tuple[list[Conversation], list[BadRow]]:
    """Return the training rows, or those kept from them; bad rows are counted with the former."""
    learnt, kept = divide(conversations, settings.validation_frac, settings.validation_seed)
    if not kept or not learnt:
        raise ConfigError(
            f"`data.validation_frac` is {settings.validation_frac}, but the {len(conversations)} rows for"
            " training cannot be divided: rows with the same question stay together, and both parts need one."
            " Give a file for evaluation (`data.validation_file=FILE`), or more rows."
        )
    return (learnt, bad) if part == "train" else (kept[: settings.max_samples_of(split)], [])


def _joined_layout(layouts: Sequence[Layout]) -> Layout:
    """Return the layout that files have; what they are called and read together, where it is not one."""
    first = layouts[0]
    return replace(
        first,
        name=" and ".join(dict.fromkeys(layout.name for layout in layouts)),
        columns=tuple(dict.fromkeys(name for layout in layouts for name in layout.columns)),
    )


def _with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Put a system message in front of a conversation that has none; an answer alone is plain text."""
    is_open = system is not None and messages[0].role not in ("system", "assistant")
    return (Message("system", system), *messages) if is_open and system is not None else tuple(messages)


def common_system(conversations: Sequence[Conversation]) -> str | None:
    """Return the system message that all conversations begin with, None where there is no such one.

    Args:
        conversations: of a split. Tools belong to their row: a message that announces some is not common.
    """
    first = conversations[0].messages[0] if conversations else None
    if first is None or first.role != "system" or first.tools:
        return None
    return first.content if all(each.messages[0] == first for each in conversations) else None


def load_split(
    settings: DataSettings,
    split: str,
    tokenizer: TextTokenizer,
    *,
    context: int | None = None,
    progress: bool = False,
) -> EncodedSplit:
    """Read and encode a split for training.

    Args:
        settings: the data settings; lengths that are null are those of this split.
        split: ``train``, ``validation`` or ``test``.
        tokenizer: a GLM tokenizer; it decides the template.
        context: of the model, in tokens, which bounds such lengths; None: not known.
        progress: show a progress bar on the error stream.

    Returns:
        The encoded rows.

    Raises:
        ConfigError: no file is given for the split.
        DataError: as `load_conversations`; also rows that cannot be made to fit the lengths.
    """
    loaded = load_conversations(settings, split, warn=False)
    if not has_lengths(settings):
        counted = _with_progress(loaded.conversations, f"measuring {split}", progress)
        settings = resolve_lengths(settings, training_lengths(counted, tokenizer, settings), context=context)
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
            path = "" if conversation.path == loaded.path else conversation.path
            bad.append(BadRow(conversation.line, str(problem), path=path))
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
        unused_columns=loaded.unused_columns,
        settings=settings,
        system=common_system(loaded.conversations),
        is_chat=any(len(each.messages) > 1 for each in loaded.conversations),
    )


def _refuse_bad_rows(bad: list[BadRow], num_good: int, total: int, path: str, settings: DataSettings) -> None:
    if bad and (settings.on_bad_row == "error" or not num_good):
        raise bad_rows_error(path, bad, total)


def _warn_of_bad_rows(bad: Sequence[BadRow], total: int, path: str) -> None:
    if bad:
        logger.warning(
            "%s: %d of %d rows left out (data.on_bad_row=skip); the first, %sline %d: %s",
            path, len(bad), total, f"{bad[0].path}, " * bool(bad[0].path), bad[0].line, bad[0].problem,
        )  # fmt: skip


def _with_progress(
    conversations: Sequence[Conversation], title: str, progress: bool
) -> Iterable[Conversation]:
    if not progress:
        yield from conversations
        return
    from glmtune.terminal.progress import Meter

    with Meter(title, total=len(conversations), transient=True) as meter:
        for number, conversation in enumerate(conversations):
            meter.update(number)
            yield conversation
        meter.update(len(conversations))


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
