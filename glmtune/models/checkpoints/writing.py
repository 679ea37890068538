"""A model as a checkpoint: names and config.json of the format that its configuration says, safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.checkpoints.config import NativeConfig, stored_config
from glmtune.models.checkpoints.names import Entry, FusedLayout, listed, official_tensor, written_table
from glmtune.models.checkpoints.quantized_layout import SCALE, ZERO, QuantizedLayout
from glmtune.models.checkpoints.shard_writer import LazyTensors, write_shards
from glmtune.models.releases.families import family_of_config
from glmtune.storage.files import write_json

DEFAULT_SHARD_BYTES = 2 * 2**30
"""Largest weight file; about as much memory is held while a model is written."""


def save_official(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write a model as a checkpoint: official names and config.json, or transformers' if it was read so.

    Each file appears whole or not at all; weights of an earlier save in the folder are removed at the end.

    Args:
        model: configured by `native_config`.
        folder: created if absent.
        max_shard_bytes: a new file begins where the next tensor would exceed it.
        dtype: floating type to store; None keeps each tensor's own.
        state_dict: native name → tensor, where they are not the model's own (gathered by a trainer).

    Returns:
        The files written, config.json last.

    Raises:
        ConfigError: embedding and head were rounded in memory beside blocks in floating point.
        CheckpointError: parameters of the model are missing from ``state_dict``; its configuration names no
            family.
        OSError: the disk is full or the folder not writable.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    family_of_config(config)  # raises before anything is written
    layout = QuantizedLayout.of(config)
    if (layout is None or not layout.has_int8_embeddings) and any(
        getattr(module, "source_signs", None) is not None for module in model.modules()
    ):
        raise ConfigError(
            f"Cannot save {folder}: embedding and head were rounded to INT8 in memory "
            "(`quantization_embeddings=int8`) beside blocks in floating point, which no checkpoint holds. "
            "Load it without that to save it, or quantize the blocks, too."
        )
    state = model.state_dict() if state_dict is None else state_dict
    table = written_table(config)
    missing = [name for entry in table for name in entry.native if name not in state]
    if missing:
        raise CheckpointError(f"Cannot save {folder}: {len(missing)} tensors are missing: {listed(missing)}.")
    dtypes = {entry.official: _stored_dtype(entry, state[entry.native[0]], dtype) for entry in table}
    written = write_shards(
        folder, official_tensors(state, config), dtypes=dtypes, max_shard_bytes=max_shard_bytes
    )
    floating = next(dtypes[entry.official] for entry in table if not _is_quantized(entry))
    write_json(folder / "config.json", stored_config(config, floating))
    files = [*written.files, folder / "config.json"]
    # Last: a kill on the way shall leave too many files in the folder rather than too few.
    for stale in _earlier_weights(folder):
        if stale not in files:
            stale.unlink()
    return files


def official_tensors(weights: Mapping[str, Tensor], config: NativeConfig) -> LazyTensors:
    """Offer native tensors as a checkpoint holds them: under official names, query, key and value fused.

    Args:
        weights: native name → tensor; looked at when an official one is asked for.
        config: as made by `native_config`.
    """
    layout, table = FusedLayout.of(config), written_table(config)
    makers = {entry.official: partial(official_tensor, entry, weights, layout) for entry in table}
    return LazyTensors(makers, {entry.official: entry.shape for entry in table})


def _stored_dtype(entry: Entry, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the type to store: codes, scales and zero points are never cast."""
    return tensor.dtype if _is_quantized(entry) or dtype is None else dtype


def _is_quantized(entry: Entry) -> bool:
    return entry.is_codes or entry.official.endswith((SCALE, ZERO))


def _earlier_weights(folder: Path) -> Iterator[Path]:
    pattern = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    return (file for file in folder.iterdir() if pattern.fullmatch(file.name))
