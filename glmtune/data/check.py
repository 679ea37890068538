"""Look at a data set before training: counts, lengths, truncation, duplicates, overlap, and one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from glmtune.data.conversations import SplitReader
from glmtune.data.dataset import (
    EncodedSplit,
    MeasuredSplit,
    encode_split,
    joined_lengths,
    measure_split,
    mixed_readers,
    refuse_streaming,
)
from glmtune.data.encode import encode_training_row
from glmtune.data.encoded.mixture import MixPart, rows_per_epoch
from glmtune.data.lengths import LENGTHS, STEP_TOKENS, chosen_words, limit_for, resolve_lengths
from glmtune.data.reading.sources import find_data_files
from glmtune.data.records import BadRow, Conversation
from glmtune.data.settings import PREFERENCE, SPLITS, DataSettings, mixed_sets
from glmtune.data.truncation import TruncationCounts
from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX
from glmtune.models.templates.renderer import TextTokenizer, template_for

_NUM_BINS = 12
"""Of the histogram, to fit on a terminal."""


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Token counts of one part of the rows, before any truncation.

    Attributes:
        mean: average.
        median: half of the rows are at most this long.
        p90: 90 % of the rows are at most this long.
        p95: likewise.
        p99: likewise.
        max: the longest.
    """

    mean: float
    median: int
    p90: int
    p95: int
    p99: int
    max: int


@dataclass(frozen=True, slots=True)
class JudgedReport:
    """What is compared in rows of the layout ``preference``.

    Attributes:
        num_pairs: rows with a better and a worse answer.
        num_desirable: single answers judged to be such.
        num_undesirable: single answers judged not to be.
        desirable_tokens: lengths of the better answers, end token included; None: there are none.
        undesirable_tokens: lengths of the worse ones, likewise.
        num_longer: pairs whose better answer is the longer one: what is preferred may be length.
    """

    num_pairs: int
    num_desirable: int
    num_undesirable: int
    desirable_tokens: LengthStats | None
    undesirable_tokens: LengthStats | None
    num_longer: int


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What `check_data` found in one split.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
        mix_name: name of the set of a mixture; empty where there is one set.
        rows_per_epoch: rows of it in an epoch of the mixture; None where there is one set.
        path: the file or hub id.
        kind: file format.
        encoding: text encoding found, empty for binary sources.
        layout: how the rows were read.
        columns: the columns read.
        unused_columns: columns in the file that are not read.
        num_rows: usable conversations.
        num_training_rows: rows they give for training.
        num_multi_turn: conversations with more than one question.
        num_bad_rows: rows that cannot be used, ``num_empty_answers`` included.
        num_empty_answers: rows that lack nothing but their answer.
        bad_rows: the first of them.
        prompt_tokens: lengths of the prompts.
        answer_tokens: lengths of the answers, end token included.
        histogram: (lower bound, upper bound, rows) of prompt plus answer tokens.
        truncation: what the configured limits cut.
        num_duplicates: rows whose prompt and answer occurred before.
        num_duplicate_prompts: rows whose prompt occurred before.
        num_tokens: tokens after truncation.
        loss_frac: share of them that carries loss.
        fingerprint: sha256 of all messages.
        judged: of rows with two answers or a judged one; None where an answer is simply learnt.
    """

    split: str
    mix_name: str
    rows_per_epoch: int | None
    path: str
    kind: str
    encoding: str
    layout: str
    columns: tuple[str, ...]
    unused_columns: tuple[str, ...]
    num_rows: int
    num_training_rows: int
    num_multi_turn: int
    num_bad_rows: int
    num_empty_answers: int
    bad_rows: tuple[BadRow, ...]
    prompt_tokens: LengthStats
    answer_tokens: LengthStats
    histogram: tuple[tuple[int, int, int], ...]
    truncation: TruncationCounts
    num_duplicates: int
    num_duplicate_prompts: int
    num_tokens: int
    loss_frac: float
    fingerprint: str
    judged: JudgedReport | None = None


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """Rows of another split that occur in the training split.

    Attributes:
        split: ``validation`` or ``test``; of a mixture with the name of the set.
        num_rows: its rows.
        num_same_prompt: rows whose prompt occurs in the training split.
        num_same_row: rows whose prompt and answer occur in the training split.
    """

    split: str
    num_rows: int
    num_same_prompt: int
    num_same_row: int


@dataclass(frozen=True, slots=True)
class SamplePart:
    """A piece of the rendered sample.

    Attributes:
        text: what the tokens say; control tokens by name.
        num_tokens: how many they are.
        has_loss: whether they carry loss.
    """

    text: str
    num_tokens: int
    has_loss: bool


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything `glmtune data check` says.

    Attributes:
        splits: one report per split.
        overlaps: the other splits against the training split.
        same_file: splits left out because they are the file of an earlier one, as (split, earlier split).
        sample: the first row of the first split, as trained on.
        rejected_sample: of a preference pair, the same prompt with the worse answer; empty: there is none.
        sample_line: its line in the file.
        template: name of the prompt template.
        max_source_length: the configured limit, in tokens.
        max_target_length: the configured limit, in tokens.
        wanted_source_length: smallest round limit that leaves 99 % of the prompts whole, in tokens.
        wanted_target_length: smallest round limit that leaves 99 % of the answers whole, in tokens.
        chosen_lengths: which limits the data told, in words; empty: none.
    """

    splits: tuple[SplitReport, ...]
    overlaps: tuple[OverlapReport, ...]
    same_file: tuple[tuple[str, str], ...]
    sample: tuple[SamplePart, ...]
    rejected_sample: tuple[SamplePart, ...]
    sample_line: int
    template: str
    max_source_length: int
    max_target_length: int
    wanted_source_length: int
    wanted_target_length: int
    chosen_lengths: str

    @property
    def num_bad_rows(self) -> int:
        """Bad rows of all splits."""
        return sum(split.num_bad_rows for split in self.splits)


def check_data(
    settings: DataSettings, tokenizer: TextTokenizer, *, context: int | None = None, progress: bool = False
) -> DataReport:
    """Read all splits that are given and report on them; bad rows are counted, never raised.

    Args:
        settings: the data settings as training would use them; lengths that are null become those of the
            training rows, as they do there.
        tokenizer: a GLM tokenizer; it decides the template.
        context: of the model, in tokens, which bounds such lengths; None: not known.
        progress: show progress bars on the error stream.

    Returns:
        The report.

    Raises:
        ConfigError: no file is given for any split.
        DataError: a file cannot be read at all, or has no usable row.
    """
    refuse_streaming(settings, "a check")
    readers, same_file = _all_splits(replace(settings, on_bad_row="skip"))
    asked, template = settings, template_for(tokenizer)
    found: list[_Checked] = []
    for split in dict.fromkeys(reader.split for _, reader in readers):
        own = [(name, reader) for name, reader in readers if reader.split == split]
        measured = [measure_split(reader, tokenizer, progress=progress) for _, reader in own]
        # The first one's, training if there is some.
        settings = resolve_lengths(settings, joined_lengths(measured), context=context)
        limits = {name: getattr(settings, name) for name in LENGTHS}
        for (name, reader), each in zip(own, measured, strict=True):
            encoded = encode_split(reader, tokenizer, replace(reader.settings, **limits), progress=progress)
            found.append(_Checked(name, each, encoded))
    assert settings.max_source_length is not None
    assert settings.max_target_length is not None
    first, lengths = found[0].encoded, joined_lengths([each.measured for each in found])
    train = [each.measured for each in found if each.encoded.split == "train"]
    return DataReport(
        splits=_reports(found, settings, extra_tokens=not template.bidirectional_context),
        overlaps=tuple(_overlap(train, each) for each in found if train and each.encoded.split != "train"),
        same_file=same_file,
        sample=render_sample(tokenizer, better_of(first.sample), first.settings),
        rejected_sample=()
        if (worse := worse_of(first.sample)) is None
        else render_sample(tokenizer, worse, first.settings),
        sample_line=first.sample.line,
        template=template.name,
        max_source_length=settings.max_source_length,
        max_target_length=settings.max_target_length,
        wanted_source_length=limit_for(lengths.prompts),
        wanted_target_length=limit_for(lengths.answers),
        chosen_lengths=chosen_words(asked, settings),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Checked:
    """A split, or a set of a mixture in it, as it was measured and encoded."""

    name: str
    measured: MeasuredSplit
    encoded: EncodedSplit


def _all_splits(
    settings: DataSettings,
) -> tuple[list[tuple[str, SplitReader]], tuple[tuple[str, str], ...]]:
    if settings.mix is not None:
        splits = ["train", "validation"] if settings.has_validation else ["train"]
        mixed = [(one.name, reader) for split in splits for one, reader in mixed_readers(settings, split)]
        return mixed + [("", SplitReader(settings, "test")) for _ in filter(None, [settings.test_file])], ()
    readers: list[tuple[str, SplitReader]] = []
    same: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    for split in [split for split in SPLITS if settings.file_of(split)]:
        sources = find_data_files(settings, split)
        key = "\n".join(str(Path(file).resolve()) if Path(file).exists() else file for file in sources)
        key += settings.part_of_training_rows(split) or ""
        if key in seen:
            same.append((split, seen[key]))
            continue
        seen[key] = split
        readers.append(("", SplitReader(settings, split)))
    if not readers:
        raise ConfigError(
            "`data.train_file` is not set, nor is any other file, so there is nothing to check. Choose a data"
            " set, such as `data=ads`, or give a file: `data=files data.train_file=FILE`."
        )
    return readers, tuple(same)


def _reports(
    found: Sequence[_Checked], settings: DataSettings, *, extra_tokens: int
) -> tuple[SplitReport, ...]:
    """Report on each split, or set of a mixture, with what an epoch takes of it."""
    train = [each for each in found if each.name and each.encoded.split == "train"]
    weights = {one.name: one.weight for one, _ in mixed_sets(settings)}
    parts = [MixPart(each.name, weights[each.name], len(each.encoded.lengths)) for each in train]
    counts = dict(zip([each.name for each in train], rows_per_epoch(parts), strict=True))
    return tuple(
        _report(each, counts.get(each.name) if each in train else None, extra_tokens=extra_tokens)
        for each in found
    )


def _report(checked: _Checked, count: int | None, *, extra_tokens: int) -> SplitReport:
    measured, encoded = checked.measured, checked.encoded
    facts, prompts = encoded.facts, measured.lengths.prompts
    answers = measured.lengths.answers + extra_tokens
    return SplitReport(
        split=facts.split,
        mix_name=checked.name,
        rows_per_epoch=count,
        path=facts.path,
        kind=facts.kind,
        encoding=facts.encoding,
        layout=facts.layout.name,
        columns=facts.layout.columns,
        unused_columns=facts.unused_columns,
        num_rows=encoded.num_conversations,
        num_training_rows=len(encoded.lengths),
        num_multi_turn=measured.num_multi_turn,
        num_bad_rows=len(encoded.bad),
        num_empty_answers=sum(row.empty_answer for row in encoded.bad),
        bad_rows=tuple(encoded.bad[:10]),
        prompt_tokens=_stats(prompts),
        answer_tokens=_stats(answers),
        histogram=_histogram(prompts + answers),
        truncation=encoded.truncation,
        num_duplicates=_num_repeated(measured.row_keys),
        num_duplicate_prompts=_num_repeated(measured.prompt_keys),
        num_tokens=encoded.num_tokens,
        loss_frac=encoded.num_loss_tokens / encoded.num_tokens,
        fingerprint=facts.fingerprint,
        judged=_judged(encoded) if facts.layout.name == PREFERENCE else None,
    )


def _judged(encoded: EncodedSplit) -> JudgedReport:
    lengths, good = encoded.num_loss_tokens_per_row, encoded.desirable
    num_pairs = len(lengths) - encoded.num_conversations
    sides = [lengths[good], lengths[~good]]
    better, worse = (_stats(side) if len(side) else None for side in sides)
    return JudgedReport(
        num_pairs=num_pairs,
        num_desirable=0 if num_pairs else int(good.sum()),
        num_undesirable=0 if num_pairs else int((~good).sum()),
        desirable_tokens=better,
        undesirable_tokens=worse,
        num_longer=int((sides[0] > sides[1]).sum()) if num_pairs and len(sides[0]) == len(sides[1]) else 0,
    )


def _num_repeated(keys: np.ndarray) -> int:
    return len(keys) - len(np.unique(keys))


def _overlap(train: Sequence[MeasuredSplit], other: _Checked) -> OverlapReport:
    """Compare with the training rows of all sets."""
    prompts, rows = other.measured.prompt_keys, other.measured.row_keys
    known_prompts = np.concatenate([each.prompt_keys for each in train])
    known_rows = np.concatenate([each.row_keys for each in train])
    return OverlapReport(
        split=other.encoded.split + f" ({other.name})" * bool(other.name),
        num_rows=len(rows),
        num_same_prompt=int(np.isin(prompts, known_prompts).sum()),
        num_same_row=int(np.isin(rows, known_rows).sum()),
    )


def _stats(lengths: np.ndarray) -> LengthStats:
    median, p90, p95, p99 = (
        int(value) for value in np.percentile(lengths, [50, 90, 95, 99], method="inverted_cdf")
    )
    return LengthStats(float(lengths.mean()), median, p90, p95, p99, int(lengths.max()))


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Count lengths in equal bins of a round width; the last bin takes the longest percent, however long."""
    top = int(np.percentile(lengths, 99, method="inverted_cdf"))
    width = max(1, -(-(top + 1) // _NUM_BINS))
    width = -(-width // STEP_TOKENS) * STEP_TOKENS if width > STEP_TOKENS else width
    num_bins = top // width + 1
    counts = np.bincount(np.minimum(lengths // width, num_bins - 1), minlength=num_bins)
    bins = [(index * width, (index + 1) * width - 1, int(count)) for index, count in enumerate(counts)]
    bins[-1] = (bins[-1][0], max(bins[-1][1], int(lengths.max())), bins[-1][2])
    return tuple(bins[int(np.flatnonzero(counts)[0]) :])


def better_of(conversation: Conversation) -> Conversation:
    """Return a row with its better or only answer, as if that were simply learnt."""
    return replace(conversation, rejected=None, desirable=None)


def worse_of(conversation: Conversation) -> Conversation | None:
    """Return a row with its worse answer, as if that were simply learnt; None where it has none."""
    if conversation.rejected is None:
        return None
    return Conversation(
        (*conversation.messages[:-1], conversation.rejected), conversation.path, conversation.line
    )


def render_sample(
    tokenizer: TextTokenizer, conversation: Conversation, settings: DataSettings
) -> tuple[SamplePart, ...]:
    """Decode one training row in parts with and without loss.

    Args:
        tokenizer: a GLM tokenizer.
        conversation: ends with an answer.
        settings: the data settings as training would use them.

    Returns:
        The parts in order; control tokens appear by name.

    Raises:
        RowProblem: the conversation cannot be encoded.
    """
    # Runs of tokens with and without loss, decoded run by run: what a user sees is what the labels say, not
    # what the template should have made of them.
    row = encode_training_row(tokenizer, conversation, settings)[-1]
    names = {tokenizer.get_command(name): name for name in getattr(tokenizer, "command_names", ())}
    names.setdefault(tokenizer.end_id, "</s>")
    parts: list[SamplePart] = []
    start = 0
    for stop in range(1, len(row.input_ids) + 1):
        learnt = row.labels[start] != IGNORE_INDEX
        if stop == len(row.input_ids) or (row.labels[stop] != IGNORE_INDEX) != learnt:
            ids = row.input_ids[start:stop]
            parts.append(SamplePart(_named_text(tokenizer, ids, names), len(ids), learnt))
            start = stop
    return tuple(parts)


def _named_text(tokenizer: TextTokenizer, ids: Sequence[int], names: dict[int, str]) -> str:
    """Decode ids, control tokens by name, the text between them in one piece."""
    texts: list[str] = []
    run: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in names:
            run.append(token)
            continue
        if run:
            texts.append(tokenizer.decode(run))  # pyright: ignore[reportAttributeAccessIssue]
            run = []
        if token is not None:
            texts.append(names[token])
    return "".join(texts)
