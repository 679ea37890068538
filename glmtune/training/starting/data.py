"""The rows of a run as it begins or goes on: loaded whole, or streamed; cut as when it began; batched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from glmtune.data.as_trained import trained_with
from glmtune.data.collate import DynamicPaddingCollator, PackingCollator
from glmtune.data.dataset import EncodedSplit, load_split
from glmtune.data.lengths import LENGTHS, chosen_words, has_lengths
from glmtune.data.rows import Collator, RowSet, TrainingRows, row_set
from glmtune.data.settings import DataSettings
from glmtune.data.streaming.rows import StreamedSplit, stream_split
from glmtune.models.templates.renderer import TextTokenizer
from glmtune.preference.rows import PreferenceCollator, preference_set
from glmtune.terminal.text import write_error
from glmtune.tiny.generated import resolve_generated
from glmtune.training.arguments import rows_per_step
from glmtune.training.config import RunConfig
from glmtune.training.distributed import collectives

TrainSplit = EncodedSplit | StreamedSplit


def load_rows(
    config: RunConfig, tokenizer: TextTokenizer, context: int, checkpoint: Path | None
) -> tuple[TrainSplit, EncodedSplit | None]:
    """Load the rows to learn and those to evaluate on, and say what of them is not learnt from.

    Args:
        config: of the run.
        tokenizer: of the model; it decides the template.
        context: of the model, in tokens.
        checkpoint: that the run goes on from; None: it begins.

    Raises:
        ConfigError: no file is given.
        DataError: a file or its rows cannot be used.
    """
    data = _as_begun(config.data, checkpoint)
    if data.streaming:
        train: TrainSplit = stream_split(
            data,
            tokenizer,
            num_rows=rows_per_step(config.trainer) * (config.trainer.max_steps or 0),
            seed=config.seed,
            shuffle=config.trainer.shuffle,
        )
    else:
        train = load_split(data, "train", tokenizer, context=context, progress=True)
    validation = None
    if data.has_validation:  # cut as what is learnt
        validation = load_split(train.settings, "validation", tokenizer)
    if collectives.is_main_process():
        if chosen := chosen_words(config.data, train.settings):
            write_error(f"glmtune: {chosen}\n")
        for split in (train, validation):
            if split is not None:
                streamed = "streamed, " * isinstance(split, StreamedSplit)
                write_error(f"glmtune: {split.split}: {streamed}{split.unseen.line()}\n")
    return train, validation


def training_rows(
    config: RunConfig,
    train: TrainSplit,
    validation: EncodedSplit | None,
    tokenizer: PreTrainedTokenizerBase,
) -> TrainingRows:
    """Return rows as training batches them: samples, packs of samples, or answers to compare.

    Args:
        config: of the run.
        train: rows to learn.
        validation: rows to evaluate on, if any.
        tokenizer: of the model.

    Raises:
        ConfigError: a sample is longer than a pack; the loss of preferences needs other rows.
    """
    data, preference = config.data, config.preference
    make: Callable[[int, int], Collator] = PackingCollator if data.packing else DynamicPaddingCollator
    if preference is not None:
        make = PreferenceCollator

    def rows_of(split: TrainSplit) -> RowSet:
        if preference is None:
            return row_set(split, data, seed=config.seed)
        assert isinstance(split, EncodedSplit), "settings refuse to stream them"
        return preference_set(split, preference)

    return TrainingRows(
        train=rows_of(train),
        validation=None if validation is None else rows_of(validation),
        collator=make(cast(int, tokenizer.pad_token_id), data.pad_to_multiple_of),
    )


def _as_begun(settings: DataSettings, checkpoint: Path | None) -> DataSettings:
    """Find generated files, and the lengths that the data told when the run began."""
    data = dataclasses.replace(
        settings,
        train_file=resolve_generated(settings.train_file),
        validation_file=resolve_generated(settings.validation_file),
    )
    if checkpoint is None or has_lengths(data):
        return data
    found = trained_with(checkpoint) or {}
    left: dict[str, Any] = {name: found.get(name) for name in LENGTHS if getattr(data, name) is None}
    return dataclasses.replace(data, **left)
