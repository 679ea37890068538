"""Look at a data set before training: counts, lengths, truncation, duplicates, overlap, and one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from glmtune.data.conversations import SplitReader
from glmtune.data.dataset import EncodedSplit, MeasuredSplit, encode_split, measure_split
from glmtune.data.encode import encode_training_row
from glmtune.data.lengths import STEP_TOKENS, chosen_words, limit_for, resolve_lengths
from glmtune.data.reading.sources import find_data_files
from glmtune.data.records import BadRow, Conversation
from glmtune.data.settings import SPLITS, DataSettings
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
class SplitReport:
    """What `check_data` found in one split.

    Attributes:
        split: ``train``, ``validation`` or ``test``.
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
    """

    split: str
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


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """Rows of another split that occur in the training split.

    Attributes:
        split: ``validation`` or ``test``.
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
    readers, same_file = _all_splits(replace(settings, on_bad_row="skip"))
    asked, found = settings, list[tuple[MeasuredSplit, EncodedSplit]]()
    for reader in readers:
        measured = measure_split(reader, tokenizer, progress=progress)
        # The first one's, training if there is some.
        settings = resolve_lengths(settings, measured.lengths, context=context)
        encoded = encode_split(reader, tokenizer, replace(settings, on_bad_row="skip"), progress=progress)
        found.append((measured, encoded))
    assert settings.max_source_length is not None
    assert settings.max_target_length is not None
    template = template_for(tokenizer)
    first, lengths = found[0], [measured.lengths for measured, _ in found]
    return DataReport(
        splits=tuple(_report(*each, extra_tokens=not template.bidirectional_context) for each in found),
        overlaps=tuple(
            _overlap(first[0], other) for other, _ in found[1:] if first[0].facts.split == "train"
        ),
        same_file=same_file,
        sample=render_sample(tokenizer, first[1].sample, settings),
        sample_line=first[1].sample.line,
        template=template.name,
        max_source_length=settings.max_source_length,
        max_target_length=settings.max_target_length,
        wanted_source_length=limit_for(np.concatenate([rows.prompts for rows in lengths])),
        wanted_target_length=limit_for(np.concatenate([rows.answers for rows in lengths])),
        chosen_lengths=chosen_words(asked, settings),
    )


def _all_splits(settings: DataSettings) -> tuple[list[SplitReader], tuple[tuple[str, str], ...]]:
    readers: list[SplitReader] = []
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
        readers.append(SplitReader(settings, split))
    if not readers:
        raise ConfigError(
            "`data.train_file` is not set, nor is any other file, so there is nothing to check. Choose a data"
            " set, such as `data=ads`, or give a file: `data=files data.train_file=FILE`."
        )
    return readers, tuple(same)


def _report(measured: MeasuredSplit, encoded: EncodedSplit, *, extra_tokens: int) -> SplitReport:
    facts, prompts = encoded.facts, measured.lengths.prompts
    answers = measured.lengths.answers + extra_tokens
    return SplitReport(
        split=facts.split,
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
    )


def _num_repeated(keys: np.ndarray) -> int:
    return len(keys) - len(np.unique(keys))


def _overlap(train: MeasuredSplit, other: MeasuredSplit) -> OverlapReport:
    return OverlapReport(
        split=other.facts.split,
        num_rows=len(other.row_keys),
        num_same_prompt=int(np.isin(other.prompt_keys, train.prompt_keys).sum()),
        num_same_row=int(np.isin(other.row_keys, train.row_keys).sum()),
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
