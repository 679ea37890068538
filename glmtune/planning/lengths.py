"""Lengths to plan with where the settings leave them to the data: measured if that is quick, else assumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import numpy as np

from glmtune.data.dataset import load_conversations
from glmtune.data.lengths import LENGTHS, RowLengths, has_lengths, resolve_lengths, training_lengths
from glmtune.data.reading.sources import find_data_files
from glmtune.data.settings import DataSettings, mixed_sets
from glmtune.errors import GlmtuneError
from glmtune.models.context import context_tokens
from glmtune.models.releases.presets import PRESETS
from glmtune.models.templates.renderer import TextTokenizer
from glmtune.models.tokenizers.load import load_tokenizer
from glmtune.training.config import RunConfig

MEASURED_ROWS = 2_000
"""First rows of the training split that are measured: some seconds, where all would be minutes."""
MAX_BYTES = 256 * 2**20
"""Of the file: a JSON list is read to its end whatever is asked of it."""
ASSUMED_TOKENS = 512
"""Of a prompt and of an answer, where nothing tells."""


def with_lengths(config: RunConfig) -> tuple[RunConfig, str]:
    """Put numbers in place of the lengths that are left to the data; no network is touched.

    Args:
        config: of the run.

    Returns:
        The same with numbers, and where they are from; "" if they were given.
    """
    if has_lengths(config.data):
        return config, ""
    names = " and ".join(f"`data.{name}`" for name in LENGTHS if getattr(config.data, name) is None)
    try:
        found = _measured(config) if is_here(config) else None
    except (GlmtuneError, OSError):
        found = None  # what is wrong with the data, reading it says better
    how = f"as the first {MEASURED_ROWS:,} training rows have it"
    if found is None:
        how = "assumed, as the rows are not at hand"
        nothing = RowLengths(np.array([ASSUMED_TOKENS]), np.array([ASSUMED_TOKENS]))
        packed = config.data.packing_length if config.data.packing else None
        found = resolve_lengths(config.data, nothing, context=packed)
    said = " and ".join(str(getattr(found, name)) for name in LENGTHS if getattr(config.data, name) is None)
    return dataclasses.replace(config, data=found), f"{names}: {said} tokens, {how}."


def is_here(config: RunConfig) -> bool:
    """Say whether the tokenizer is on this machine."""
    preset = PRESETS.get(config.model.source)
    return preset.hub_id is None if preset else Path(config.model.source).expanduser().is_dir()


def _measured(config: RunConfig) -> DataSettings | None:
    sets = [config.data] if config.data.mix is None else [own for _, own in mixed_sets(config.data)]
    files = [Path(name) for one in sets for name in find_data_files(one, "train")]
    if not all(file.is_file() for file in files) or sum(file.stat().st_size for file in files) > MAX_BYTES:
        return None
    source, family = config.model.source, config.model.family
    tokenizer = cast("TextTokenizer", load_tokenizer(source, family=family))
    context = context_tokens(source, family)
    found: list[RowLengths] = []
    for one in sets:
        first = min(MEASURED_ROWS, one.max_train_samples or MEASURED_ROWS)
        data = dataclasses.replace(one, max_train_samples=first, on_bad_row="skip")
        rows = load_conversations(data, "train", warn=False).conversations
        found.append(training_lengths(rows, tokenizer, data))
    prompts, answers = ([getattr(each, name) for each in found] for name in ("prompts", "answers"))
    lengths = RowLengths(np.concatenate(prompts), np.concatenate(answers))
    return resolve_lengths(config.data, lengths, context=context)
