"""The conversations of a split: file after file, one after the other, with what is said of them all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from glmtune.data.divide import kept_for_evaluation, question_key
from glmtune.data.reading.layouts import Layout
from glmtune.data.reading.sources import described_files, find_data_files, size_of
from glmtune.data.reading.tables import FileReader
from glmtune.data.records import BadRow, Conversation, RowsDigest, bad_rows_error
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError
from glmtune.messages import Message

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """What is said of all conversations of one split.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        path: the file or hub id; of several, the first and how many more.
        kind: ``json``, ``jsonl``, ``csv``, ``tsv``, ``parquet`` or ``hub``; of several files, all.
        encoding: text encoding found, empty for binary sources; of several files, all.
        layout: the layout they were read with; of several files, what is read in any.
        unused_columns: columns that occur in the file but are not read, and keys of messages likewise.
        bad: rows left out (only with ``on_bad_row="skip"``).
        total: rows looked at, those of another part of the same file included.
        num_conversations: usable ones.
        fingerprint: sha256 of all messages, independent of file format and layout.
        system: the system message that all rows have, None where they have none or several.
        is_chat: whether rows have questions; False: they are plain text.
    """

    split: str
    path: str
    kind: str
    encoding: str
    layout: Layout
    unused_columns: tuple[str, ...]
    bad: Sequence[BadRow]
    total: int
    num_conversations: int
    fingerprint: str
    system: str | None
    is_chat: bool


@dataclass(frozen=True, slots=True)
class ConversationSet:
    """The conversations of one split, all of them at hand.

    Attributes:
        conversations: usable rows, in file order.
        facts: what is said of them all.
    """

    conversations: Sequence[Conversation]
    facts: SplitFacts

    @property
    def split(self) -> str:
        """See `SplitFacts`."""
        return self.facts.split

    @property
    def path(self) -> str:
        """See `SplitFacts`."""
        return self.facts.path

    @property
    def kind(self) -> str:
        """See `SplitFacts`."""
        return self.facts.kind

    @property
    def encoding(self) -> str:
        """See `SplitFacts`."""
        return self.facts.encoding

    @property
    def layout(self) -> Layout:
        """See `SplitFacts`."""
        return self.facts.layout

    @property
    def unused_columns(self) -> tuple[str, ...]:
        """See `SplitFacts`."""
        return self.facts.unused_columns

    @property
    def bad(self) -> Sequence[BadRow]:
        """See `SplitFacts`."""
        return self.facts.bad

    @property
    def fingerprint(self) -> str:
        """See `SplitFacts`."""
        return self.facts.fingerprint


class SplitReader:
    """Reads the conversations of a split, anew each time that one goes through it; none is kept.

    Attributes:
        settings: the data settings.
        split: ``train``, ``validation`` or ``test``.
        sources: its files and hub ids, in the order they are read in.
        num_bytes: of these files; of hub data sets as loaded.
    """

    def __init__(self, settings: DataSettings, split: str, *, need_answers: bool = True) -> None:
        """Find the files.

        Args:
            settings: the data settings.
            split: ``train``, ``validation`` or ``test``.
            need_answers: whether rows without an answer are bad (training) or questions to answer.

        Raises:
            ConfigError: no file is given for the split.
            DataError: a file is nowhere.
        """
        if settings.mix is not None and (split != "test" or not settings.test_file):
            raise ConfigError(
                f"`data.mix` names several data sets, but one is read here for its {split} rows. Name it:"
                f" `data.mix=null data.{split}_file=FILE`."
            )
        self.settings, self.split = settings, split
        self.part = settings.part_of_training_rows(split)
        # Rows that training cannot use are none to divide either, whoever asks for their questions.
        self.need_answers = need_answers or self.part is not None
        self.sources = find_data_files(settings, split)
        sizes = [size_of(source) for source in self.sources]
        self.num_bytes = sum(sizes)
        self._bytes_before = [sum(sizes[:place]) for place in range(len(sizes))]
        self._sizes = sizes
        self._kept: Sequence[bool] | None = None
        self._files: list[FileReader] = []
        self._seen = _Seen()

    @property
    def limit(self) -> int | None:
        """Rows looked at, at most."""
        return self.settings.max_samples_of("train" if self.part else self.split)

    @property
    def fraction(self) -> float:
        """How much of the files is read, from 0 to 1; 0 where that is not known."""
        place = len(self._files) - 1
        if place < 0 or not self.num_bytes:
            return 0.0
        return (self._bytes_before[place] + self._sizes[place] * self._files[place].fraction) / self.num_bytes

    def __iter__(self) -> Iterator[Conversation]:
        """Yield the usable conversations of the split.

        Raises:
            ConfigError: the training rows cannot be divided as asked.
            DataError: a file cannot be read.
        """
        if self.part is not None and self._kept is None:
            self._kept = self._divide()
        self._seen = _Seen()
        most = None if self.part in (None, "train") else self.settings.max_samples_of(self.split)
        for place, conversation in enumerate(self._read()):
            if self._kept is not None and self._kept[place] != (self.part != "train"):
                continue
            if most is not None and self._seen.count == most:
                continue  # read on: what is wrong behind it is said all the same
            self._seen.add(conversation)
            yield conversation

    def _read(self) -> Iterator[Conversation]:
        """Yield the usable conversations of all files, whatever part of them is asked for."""
        self._files = []
        for source in self.sources:
            left = None if self.limit is None else self.limit - sum(file.num_rows for file in self._files)
            if left == 0:
                break
            file = FileReader(source, self.settings, self.split, limit=left, need_answers=self.need_answers)
            self._files.append(file)
            for item in file:
                yield replace(item, messages=with_system(item.messages, self.settings.system))

    def _divide(self) -> Sequence[bool]:
        """Return which rows are kept for evaluation, from their questions alone."""
        seed = self.settings.validation_seed
        keys = [question_key(conversation, seed) for conversation in self._read()]
        self._refuse(len(keys))
        kept = kept_for_evaluation(keys, self.settings.validation_frac)
        if not any(kept) or all(kept):
            raise ConfigError(
                f"`data.validation_frac` is {self.settings.validation_frac}, but the {len(keys)} rows for"
                " training cannot be divided: rows with the same question stay together, and both parts need"
                " one. Give a file for evaluation (`data.validation_file=FILE`), or more rows."
            )
        return kept

    def _bad(self) -> list[BadRow]:
        several = len(self._files) > 1
        return [replace(row, path=file.path if several else "") for file in self._files for row in file.bad]

    def _refuse(self, num_good: int) -> None:
        bad, path = self._bad(), described_files(file.path for file in self._files)
        refuse_bad_rows(bad, num_good, num_good + len(bad), path, self.settings)

    @property
    def has_bad(self) -> bool:
        """Whether a row has been met that cannot be used."""
        return any(file.bad for file in self._files)

    def facts(self) -> SplitFacts:
        """Return what is said of all conversations, once they have been gone through.

        Raises:
            DataError: no row is usable, or (with ``on_bad_row="error"``) some are not; all of them are
                reported together.
        """
        num_good = self._seen.count if self._kept is None else len(self._kept)
        self._refuse(num_good)
        files, bad, seen = self._files, self._bad(), self._seen
        return SplitFacts(
            split=self.split,
            path=described_files(file.path for file in files),
            kind=" and ".join(dict.fromkeys(file.kind for file in files)),
            encoding=" and ".join(dict.fromkeys(file.encoding for file in files if file.encoding)),
            layout=_joined_layout([file.layout for file in files if file.layout is not None]),
            unused_columns=tuple(dict.fromkeys(name for file in files for name in file.unused_columns)),
            bad=[] if self.part not in (None, "train") else bad,  # counted once, with those to learn
            total=num_good + len(bad),
            num_conversations=seen.count,
            fingerprint=seen.digest.hexdigest(),
            system=seen.system,
            is_chat=seen.is_chat,
        )


@dataclass(slots=True)
class _Seen:
    """What is told of conversations as they pass."""

    count: int = 0
    digest: RowsDigest = field(default_factory=RowsDigest)
    first: Message | None = None
    is_alike: bool = True
    is_chat: bool = False

    def add(self, conversation: Conversation) -> None:
        if not self.count:
            self.first = conversation.messages[0]
        self.is_alike = self.is_alike and conversation.messages[0] == self.first
        self.is_chat = self.is_chat or len(conversation.messages) > 1
        self.count += 1
        self.digest.add(conversation)

    @property
    def system(self) -> str | None:
        """The system message that all begin with; one with tools is not common: these belong to their row."""
        first = self.first
        is_common = first is not None and first.role == "system" and not first.tools and self.is_alike
        return first.content if first is not None and is_common else None


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
    reader = SplitReader(settings, split, need_answers=need_answers)
    conversations = list(reader)
    facts = reader.facts()
    if warn:
        warn_of_bad_rows(facts.bad, facts.total, facts.path)
    return ConversationSet(conversations, facts)


def _joined_layout(layouts: Sequence[Layout]) -> Layout:
    """Return the layout that files have; what they are called and read together, where it is not one."""
    first = layouts[0]
    return replace(
        first,
        name=" and ".join(dict.fromkeys(layout.name for layout in layouts)),
        columns=tuple(dict.fromkeys(name for layout in layouts for name in layout.columns)),
    )


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Put a system message in front of a conversation that has none; an answer alone is plain text."""
    is_open = system is not None and messages[0].role not in ("system", "assistant")
    return (Message("system", system), *messages) if is_open and system is not None else tuple(messages)


def refuse_bad_rows(
    bad: Sequence[BadRow], num_good: int, total: int, path: str, settings: DataSettings
) -> None:
    """Raise one DataError for all bad rows, unless they are to be skipped and others are left."""
    if bad and (settings.on_bad_row == "error" or not num_good):
        raise bad_rows_error(path, bad, total)


def warn_of_bad_rows(bad: Sequence[BadRow], total: int, path: str) -> None:
    """Log how many rows are left out, and why the first one is."""
    if bad:
        logger.warning(
            "%s: %d of %d rows left out (data.on_bad_row=skip); the first, %sline %d: %s",
            path, len(bad), total, f"{bad[0].path}, " * bool(bad[0].path), bad[0].line, bad[0].problem,
        )  # fmt: skip
