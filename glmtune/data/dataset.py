"""Load a split: rows read, checked, encoded, and kept compactly for the trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from glmtune.data.conversations import (
    SplitFacts,
    SplitReader,
    load_conversations,
    refuse_bad_rows,
    warn_of_bad_rows,
)
from glmtune.data.encode import refuse_settings
from glmtune.data.encoded import cache
from glmtune.data.encoded.batches import MeasuredBatch
from glmtune.data.encoded.identity import rows_key
from glmtune.data.encoded.mixture import MixPart, joined_facts, joined_truncation
from glmtune.data.encoded.passing import is_large, passed
from glmtune.data.encoded.table import RowTable, read_table
from glmtune.data.lengths import LENGTHS, RowLengths, has_lengths, resolve_lengths, without_limits
from glmtune.data.reading.layouts import Layout
from glmtune.data.records import BadRow, Conversation
from glmtune.data.settings import DataSettings, MixedSet, mixed_sets
from glmtune.data.truncation import TruncationCounts, Unseen
from glmtune.errors import ConfigError
from glmtune.messages import Message
from glmtune.models.templates.renderer import TextTokenizer, template_for

if TYPE_CHECKING:
    import datasets

__all__ = [
    "EncodedSplit",
    "MeasuredSplit",
    "encode_split",
    "joined_lengths",
    "load_conversations",
    "load_split",
    "measure_split",
    "mixed_readers",
    "refuse_streaming",
]

logger = logging.getLogger(__name__)

ROWS_FILE = "rows.arrow"
Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """A split ready for training.

    Attributes:
        rows: columns ``input_ids``, ``labels`` (int32 lists) and ``length`` (tokens, for length grouping);
            in memory, or mapped into it from the cache.
        lengths: the column ``length`` as int32 ``[rows]``.
        num_loss_tokens_per_row: tokens that carry loss, int32 ``[rows]``.
        desirable: whether the answer is one to give more often, bool ``[rows]``; a preference pair is two
            rows, the better answer's first. True throughout where nothing is judged.
        num_conversations: conversations behind the rows.
        truncation: what was cut.
        facts: of the conversations.
        bad: rows left out (only with ``on_bad_row="skip"``).
        settings: they were encoded with, the lengths that the data told in place.
        sample: the first conversation behind a row.
        parts: the sets of a mixture; empty where the rows are of one.
    """

    rows: datasets.Dataset
    lengths: np.ndarray
    num_loss_tokens_per_row: np.ndarray
    desirable: np.ndarray
    num_conversations: int
    truncation: TruncationCounts
    facts: SplitFacts
    bad: Sequence[BadRow]
    settings: DataSettings
    sample: Conversation
    parts: tuple[MixPart, ...] = ()

    @property
    def unseen(self) -> Unseen:
        """What of the rows is not learnt from."""
        return Unseen(len(self.lengths), self.truncation, self.facts.unused_columns, len(self.bad))

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_loss_tokens(self) -> int:
        """Tokens of all rows that carry loss."""
        return int(self.num_loss_tokens_per_row.sum(dtype=np.int64))

    @property
    def fingerprint(self) -> str:
        """Of the conversations, see `SplitFacts`."""
        return self.facts.fingerprint

    @property
    def path(self) -> str:
        """The file or hub id; of several, the first and how many more."""
        return self.facts.path

    @property
    def split(self) -> str:
        """``train``, ``validation`` or ``test``."""
        return self.facts.split

    @property
    def system(self) -> str | None:
        """The system message that all rows have, None where they have none or several."""
        return self.facts.system

    @property
    def is_chat(self) -> bool:
        """Whether rows have questions; False: they are plain text."""
        return self.facts.is_chat


@dataclass(frozen=True, slots=True)
class MeasuredSplit:
    """How long the rows of a split are, before any truncation, and which are alike.

    Attributes:
        lengths: of the rows they give for training.
        row_keys: of the conversations, uint64 ``[conversations]``: equal where all messages are.
        prompt_keys: likewise of what comes before the last answer.
        num_multi_turn: conversations with more than one question.
        facts: of the conversations.
    """

    lengths: RowLengths
    row_keys: np.ndarray
    prompt_keys: np.ndarray
    num_multi_turn: int
    facts: SplitFacts


def load_split(
    settings: DataSettings,
    split: str,
    tokenizer: TextTokenizer,
    *,
    context: int | None = None,
    progress: bool = False,
) -> EncodedSplit:
    """Read and encode a split for training, or take it from the cache.

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
    if split == "train":
        refuse_streaming(settings, "this command")
    if settings.mix is not None and not (split == "test" and settings.test_file):
        return _load_mixture(settings, split, tokenizer, context, progress)
    reader = SplitReader(settings, split)
    if not has_lengths(settings):
        measured = measure_split(reader, tokenizer, progress=progress)
        settings = resolve_lengths(settings, measured.lengths, context=context)
    encoded = encode_split(reader, tokenizer, settings, progress=progress)
    warn_of_bad_rows(encoded.bad, encoded.num_conversations + len(encoded.bad), encoded.path)
    return encoded


def refuse_streaming(settings: DataSettings, what: str) -> None:
    """Refuse rows that are streamed where all of them are needed.

    Args:
        settings: of the data.
        what: needs them, in words.

    Raises:
        ConfigError: they are streamed.
    """
    if settings.streaming:
        raise ConfigError(
            f"`data.streaming` is true, but {what} needs all training rows at once; only training streams."
            " Add `data.streaming=false`, for a part of them with `data.max_train_samples=100000`."
        )


def mixed_readers(settings: DataSettings, split: str) -> list[tuple[MixedSet, SplitReader]]:
    """Return the sets of a mixture that have rows for a split, and their readers.

    Args:
        settings: with ``mix``.
        split: ``train``, ``validation`` or ``test``, which is validation's.

    Raises:
        ConfigError: none has.
    """
    found = [(one, own) for one, own in mixed_sets(settings) if split == "train" or own.has_validation]
    if not found:
        raise ConfigError(
            f"`data.mix` has no {split} rows. Give a set a `validation_file`, or keep some of the training"
            " rows of each (`data.validation_frac=0.1`)."
        )
    return [(one, SplitReader(own, split)) for one, own in found]


def joined_lengths(measured: Sequence[MeasuredSplit]) -> RowLengths:
    """Return the lengths of the rows of several sets, each row counting once whatever the weights."""
    return RowLengths(
        np.concatenate([each.lengths.prompts for each in measured]),
        np.concatenate([each.lengths.answers for each in measured]),
    )


def _load_mixture(
    settings: DataSettings, split: str, tokenizer: TextTokenizer, context: int | None, progress: bool
) -> EncodedSplit:
    import datasets

    sets = mixed_readers(settings, split)
    if not has_lengths(settings):
        measured = [measure_split(reader, tokenizer, progress=progress) for _, reader in sets]
        settings = resolve_lengths(settings, joined_lengths(measured), context=context)
    limits = {name: getattr(settings, name) for name in LENGTHS}
    found = [
        encode_split(reader, tokenizer, replace(reader.settings, **limits), progress=progress)
        for _, reader in sets
    ]
    for each in found:
        warn_of_bad_rows(each.bad, each.num_conversations + len(each.bad), each.path)
    names = [one.name for one, _ in sets]
    # Where only some have rows for evaluation, weights still say how they are mixed in training alone.
    return EncodedSplit(
        rows=datasets.concatenate_datasets([each.rows for each in found]),
        lengths=np.concatenate([each.lengths for each in found]),
        num_loss_tokens_per_row=np.concatenate([each.num_loss_tokens_per_row for each in found]),
        desirable=np.concatenate([each.desirable for each in found]),
        num_conversations=sum(each.num_conversations for each in found),
        truncation=joined_truncation([each.truncation for each in found]),
        facts=joined_facts(names, [each.facts for each in found]),
        bad=[replace(row, path=row.path or each.path) for each in found for row in each.bad],
        settings=settings,
        sample=found[0].sample,
        parts=tuple(
            MixPart(one.name, one.weight, len(each.lengths))
            for (one, _), each in zip(sets, found, strict=True)
        ),
    )


def measure_split(reader: SplitReader, tokenizer: TextTokenizer, *, progress: bool = False) -> MeasuredSplit:
    """Measure the rows of a split, or take that from the cache.

    Args:
        reader: of the split.
        tokenizer: a GLM tokenizer; it decides the template.
        progress: show a progress bar on the error stream.

    Raises:
        DataError: see `load_conversations`.
    """
    settings = reader.settings
    names = ("prompts", "answers", "row_keys", "prompt_keys")

    def measure() -> tuple[dict[str, np.ndarray], int, SplitFacts]:
        results = [
            result
            for _, result in passed(
                "measure", reader, tokenizer, settings, f"measuring {reader.split}", progress
            )
        ]
        return _measured_arrays(results, names), sum(each.num_multi_turn for each in results), reader.facts()

    def fill(folder: Path) -> dict[str, Any]:
        arrays, num_multi_turn, facts = measure()
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values, allow_pickle=False)
        return {"num_multi_turn": num_multi_turn, "facts": asdict(facts)}

    def built(arrays: Mapping[str, np.ndarray], num_multi_turn: int, facts: SplitFacts) -> MeasuredSplit:
        lengths = RowLengths(arrays["prompts"], arrays["answers"])
        return MeasuredSplit(lengths, arrays["row_keys"], arrays["prompt_keys"], num_multi_turn, facts)

    def read(entry: cache.Entry) -> MeasuredSplit:
        arrays = {name: entry.array(name) for name in names}
        return built(arrays, int(entry.meta["num_multi_turn"]), _facts(entry.meta["facts"]))

    of_lengths = _of_lengths(settings)
    measured = _kept(settings, reader, lambda: rows_key("lengths", reader, tokenizer, of_lengths), fill, read)
    if measured is None:
        return built(*measure())
    facts = measured.facts
    refuse_bad_rows(facts.bad, facts.total - len(facts.bad), facts.total, facts.path, settings)
    return measured


def encode_split(
    reader: SplitReader, tokenizer: TextTokenizer, settings: DataSettings, *, progress: bool = False
) -> EncodedSplit:
    """Encode a split for training, or take it from the cache.

    Args:
        reader: of the split, every row with an answer.
        tokenizer: a GLM tokenizer; it decides the template.
        settings: the reader's, lengths in place.
        progress: show a progress bar on the error stream.

    Raises:
        ConfigError: a setting that the model's way of reading its context excludes.
        DataError: see `load_conversations`; also rows that cannot be made to fit the lengths or the template.
    """
    refuse_settings(template_for(tokenizer), settings)

    def fill(folder: Path) -> dict[str, Any]:
        table = RowTable(folder / ROWS_FILE)
        made = _encode(reader, tokenizer, settings, table, progress)
        table.close()
        np.save(folder / "lengths.npy", table.lengths, allow_pickle=False)
        np.save(folder / "num_loss_tokens.npy", table.num_loss_tokens, allow_pickle=False)
        np.save(folder / "desirable.npy", table.desirable, allow_pickle=False)
        return {**asdict(made), "truncation": asdict(table.truncation)}

    def read(entry: cache.Entry) -> EncodedSplit:
        meta, key = entry.meta, entry.folder.name
        rows, lengths = read_table(entry.folder / ROWS_FILE, key), entry.array("lengths")
        if len(rows) != len(lengths):
            raise ValueError(f"{len(rows)} rows have {len(lengths)} lengths")
        return EncodedSplit(
            rows=rows,
            lengths=lengths,
            num_loss_tokens_per_row=entry.array("num_loss_tokens"),
            desirable=entry.array("desirable"),
            num_conversations=int(meta["num_conversations"]),
            truncation=TruncationCounts(**meta["truncation"]),
            facts=_facts(meta["facts"]),
            bad=[BadRow(**row) for row in meta["bad"]],
            settings=settings,
            sample=_conversation(meta["sample"]),
        )

    split = _kept(settings, reader, lambda: rows_key("rows", reader, tokenizer, settings), fill, read)
    if split is not None:
        _refuse(split.facts, split.bad, settings)
        return split
    table = RowTable()
    made = _encode(reader, tokenizer, settings, table, progress)
    return EncodedSplit(
        rows=table.dataset(),
        lengths=table.lengths,
        num_loss_tokens_per_row=table.num_loss_tokens,
        desirable=table.desirable,
        num_conversations=made.num_conversations,
        truncation=table.truncation,
        facts=made.facts,
        bad=made.bad,
        settings=settings,
        sample=made.sample,
    )


def is_cached(reader: SplitReader) -> bool:
    """Say whether the encoded rows of a split are kept on disk."""
    asked = reader.settings.cache
    return asked == "always" or (asked == "auto" and is_large(reader))


def _kept(
    settings: DataSettings,
    reader: SplitReader,
    key: Callable[[], str],
    fill: Callable[[Path], dict[str, Any]],
    read: Callable[[cache.Entry], Kept],
) -> Kept | None:
    """Return what the cache holds or comes to hold; None where there is none, or it was not asked for."""
    if not is_cached(reader):
        return None
    try:
        return cache.keep(cache.cache_root(settings.cache_dir), key(), fill, read)
    except cache.CacheError as error:
        if settings.cache == "always" or settings.cache_dir is not None:
            raise
        logger.warning("%s Until then rows are encoded at every start, and held in memory.", error)
        return None


@dataclass(frozen=True, slots=True)
class _Made:
    """What is said of encoded rows.

    Attributes:
        facts: of the conversations.
        bad: rows left out: those that could not be read, then those that could not be encoded.
        num_conversations: conversations behind the rows.
        sample: the first of them.
    """

    facts: SplitFacts
    bad: Sequence[BadRow]
    num_conversations: int
    sample: Conversation


def _encode(
    reader: SplitReader, tokenizer: TextTokenizer, settings: DataSettings, table: RowTable, progress: bool
) -> _Made:
    problems: list[tuple[str, BadRow]] = []
    sample: Conversation | None = None
    for batch, result in passed("encode", reader, tokenizer, settings, f"encoding {reader.split}", progress):
        for place, problem in result.problems:
            problems.append((batch[place].path, BadRow(batch[place].line, problem)))
        wrong = {place for place, _ in result.problems}
        if sample is None:
            sample = next((each for place, each in enumerate(batch) if place not in wrong), None)
        table.add(result)
    facts = reader.facts()
    bad = [BadRow(row.line, row.problem, path="" if path == facts.path else path) for path, row in problems]
    _refuse(facts, [*facts.bad, *bad], settings)
    assert sample is not None, "a split without any usable row is refused"
    return _Made(facts, [*facts.bad, *bad], facts.num_conversations - len(bad), sample)


def _refuse(facts: SplitFacts, bad: Sequence[BadRow], settings: DataSettings) -> None:
    """Refuse bad rows: those that could not be read, or else those that could not be encoded."""
    refuse_bad_rows(facts.bad, facts.total - len(facts.bad), facts.total, facts.path, settings)
    # Shares are of what came that far: a row that could not be read was never encoded.
    unfit, total = bad[len(facts.bad) :], facts.num_conversations
    refuse_bad_rows(unfit, total - len(unfit), total, facts.path, settings)


def _measured_arrays(results: Sequence[MeasuredBatch], names: Sequence[str]) -> dict[str, np.ndarray]:
    kinds = {"prompts": np.int64, "answers": np.int64, "row_keys": np.uint64, "prompt_keys": np.uint64}
    return {
        name: np.concatenate([np.zeros(0, kinds[name]), *(getattr(each, name) for each in results)])
        for name in names
    }


def _of_lengths(settings: DataSettings) -> DataSettings:
    """Return what decides the lengths of whole rows: no limit does."""
    whole = without_limits(settings)
    return replace(whole, loss_on="all_turns") if settings.loss_on == "all_turns" else whole


def _facts(values: Mapping[str, Any]) -> SplitFacts:
    # JSON has no tuples and no records: what `asdict` took apart is put together again.
    known = {field.name: values[field.name] for field in fields(SplitFacts)}
    layout: dict[str, Any] = values["layout"]
    known |= {
        "layout": replace(Layout(**layout), columns=tuple(layout["columns"])),
        "unused_columns": tuple(values["unused_columns"]),
        "bad": [BadRow(**row) for row in values["bad"]],
    }
    return SplitFacts(**known)


def _conversation(values: Mapping[str, Any]) -> Conversation:
    messages = tuple(Message(**message) for message in values["messages"])
    worse, judged = values.get("rejected"), values.get("desirable")
    return Conversation(
        messages,
        str(values["path"]),
        int(values["line"]),
        rejected=None if worse is None else Message(**worse),
        desirable=None if judged is None else bool(judged),
    )
