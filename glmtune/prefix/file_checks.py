"""Whether the tensors and metadata of a prefix file belong to one, and fit each other and the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError
from glmtune.prefix.encoder import PrefixShape
from glmtune.storage.json_files import shown
from glmtune.switch.rule import METADATA_KEY, TENSORS

OFFICIAL_NAME = "transformer.prefix_encoder."
"""What the names of a prefix' tensors begin with in official files."""
STRENGTH = "strength"
"""Of the metadata: `PrefixEncoder.strength`, where it is not 1."""
SIZES = ("pre_seq_len", "num_layers", "num_kv_heads", "head_dim")
"""Of the metadata: whole numbers of at least 1."""
WEIGHTS = frozenset({"embedding.weight"})
PROJECTION_WEIGHTS = WEIGHTS | {"trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"}
GATE = "gate.weight"
"""Beside either of them in a gated prefix, ``[L, N]``; its metadata say ``gate`` then."""


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value of the metadata can be a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def is_strength(value: Any) -> bool:
    """Return whether a value of the metadata can be a strength."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def check_metadata(file: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Refuse values of other kinds than `save_prefix` writes, and those that the weights contradict."""
    length, projected = weights["embedding.weight"].shape[0], "trans.0.weight" in weights
    known = {"pre_seq_len": length, "prefix_projection": projected, "gate": GATE in weights}
    for key, value in metadata.items():
        if key in SIZES and not is_count(value):
            rule = "a whole number of at least 1"
        elif key in known and value != known[key]:
            rule = f"{known[key]}, as its weights are"
        elif key == STRENGTH and not is_strength(value):
            rule = "a finite number above 0"
        elif key not in known and key not in (*SIZES, STRENGTH, METADATA_KEY) and not isinstance(value, str):
            rule = "a text"
        else:
            continue
        raise CheckpointError(
            f"The prefix `{file}` says {key} = {shown(value)}, but it must be {rule}. The file, or the "
            "config.json beside it, was edited or is damaged: fetch it again."
        )


def check_names(file: Path, weights: Mapping[str, object]) -> None:
    """Refuse a file that lacks tensors of a prefix, or has others."""
    found = set(weights) - TENSORS
    expected = PROJECTION_WEIGHTS if any(name.startswith("trans.") for name in found) else WEIGHTS
    expected |= found & {GATE}
    if found != expected:
        shown = ", ".join(sorted(found)[:6]) + (", ..." if len(found) > 6 else "")
        missing, unexpected = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(
            f"`{file}` holds no prefix encoder: {len(missing)} of its tensors are missing "
            f"({', '.join(missing) or 'none'}) and {len(unexpected)} do not belong to one. "
            f"It holds: {shown}. "
            f"Expected are {', '.join(sorted(expected))}, in official files after `{OFFICIAL_NAME}`."
        )


def check_matrices(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that could not be multiplied with each other."""
    letters = {
        "embedding.weight": "PE",
        "trans.0.weight": "HE",
        "trans.0.bias": "H",
        "trans.2.weight": "WH",
        "trans.2.bias": "W",
        GATE: "LN",
    }
    lengths: dict[str, int] = {}
    for name, axes in letters.items():
        if name not in shapes:
            continue
        shape = shapes[name]
        fits = len(shape) == len(axes) and all(
            size > 0 and lengths.setdefault(axis, size) == size
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(str(lengths.get(axis, "any")) for axis in axes)
            raise CheckpointError(
                f"`{file}` holds no prefix encoder: {name} is {list(shape)}, but beside its other weights it "
                f"must be [{wanted}]. The file is damaged, or of another format; fetch it again."
            )


def check_shape(
    file: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any], expected: PrefixShape
) -> None:
    """Refuse a prefix made for another number of layers, heads or channels."""
    width = weights.get("trans.2.weight", weights["embedding.weight"].T).shape[0]
    sizes = {name: metadata[name] for name in ("num_layers", "num_kv_heads", "head_dim") if name in metadata}
    known = PrefixShape(**sizes) if len(sizes) == 3 else None
    if width == expected.kv_width and known in (None, expected):
        return
    actual = str(known) if known is not None else "a geometry it does not name"
    raise CheckpointError(
        f"The prefix `{file}` does not fit the model: it was made for {actual} ({width} numbers per "
        f"position), the model has {expected} ({expected.kv_width} numbers per position). "
        "Load it with the base it was trained on."
    )


def check_gate(file: Path, weights: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Refuse gates for another number of layers or query heads, which the prefix itself does not tell."""
    expected = [model.config.num_hidden_layers, model.config.num_attention_heads]
    if GATE in weights and list(weights[GATE].shape) != expected:
        layers, heads = weights[GATE].shape
        raise CheckpointError(
            f"The prefix `{file}` does not fit the model: it has gates for {layers} layers x {heads} query "
            f"heads, the model has {expected[0]} x {expected[1]}. Load it with the base it was trained on."
        )
