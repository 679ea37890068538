"""Fingerprints of weights: which base a prefix or adapter was trained on, which model a score is of.

There are two, and their values are on disk everywhere (prefixes, adapters, manifests, journals), so neither
may change. `weights_fingerprint` says *the same base in whatever floating type*; `hash_tensors` says *the
same numbers*, as a run in bfloat16 has other scores than one in float32. Both look at some 4,096 spread
elements per tensor: hashing all of a 9B model would take longer than loading it.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.config import FIRST_SIZES, SIZES, NativeConfig, rope_ratio
from glmtune.models.checkpoints.names import Entry, name_table
from glmtune.models.checkpoints.quantized_layout import (
    SCALE,
    ZERO,
    QuantizedLayout,
    unpacked_signs,
    without_layout,
)
from glmtune.models.checkpoints.transformers_format import is_transformers_format

SAMPLES_PER_TENSOR = 4096
NOT_COMPARED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Keys of other architectures' configurations that change no result."""
_KINDS = ("weight", SCALE, ZERO, "bias")
_PROJECTION = re.compile(rf"[qkv]_proj\.({'|'.join(_KINDS)})$")


def weights_fingerprint(config: Any, weights: Mapping[str, Tensor]) -> str:
    """Identify a base by architecture and weights.

    Only signs enter, because a sign survives every cast: float32, bfloat16 and float16 have one fingerprint.
    Training the weights changes it, and so does quantizing them; rounding embedding and head to INT8 beside
    blocks of any kind does not (`QuantizedLayout.of_base`).

    Args:
        config: as made by `native_config`.
        weights: native name → tensor, each looked at once.

    Returns:
        64 hexadecimal digits.
    """
    known = stored_signs(config)
    names = fingerprinted_names(config)
    return signs_fingerprint(
        config, {name: known[name] if name in known else sampled_signs(weights[name]) for name in names}
    )


def stored_signs(config: Any) -> dict[str, bytes]:
    """Return native name → signs of the weights that config.json tells: of embedding and head in INT8.

    Raises:
        CheckpointError: they cannot be read.
    """
    layout = QuantizedLayout.of(config)
    if layout is None or not layout.has_int8_embeddings:
        return {}
    return {
        entry.native[0]: unpacked_signs(layout.outer_signs[place])
        for place, entry in outer_entries(config).items()
        if place in layout.outer_signs
    }


def outer_entries(config: Any) -> dict[str, Entry]:
    """Return the weights of embedding and head by these words; no head where it is tied to the embedding.

    Args:
        config: as made by `native_config`; whether it has codes does not matter.
    """
    plain = copy.copy(config)
    without_layout(plain)
    table = name_table(plain)  # embedding first, head last
    entries = {"embedding": table[0], "head": table[-1]}
    return {place: entry for place, entry in entries.items() if not entry.is_copy}


def base_config(config: Any) -> Any:
    """Return a configuration whose fingerprint and names are those of `QuantizedLayout.of_base`."""
    layout = QuantizedLayout.of(config)
    if layout is None or not layout.has_int8_embeddings:
        return config
    found = copy.copy(config)
    layout.of_base.put_into(found)
    return found


def signs_fingerprint(config: Any, signs: Mapping[str, bytes]) -> str:
    """Return `weights_fingerprint` where the weights are gone, from the signs that were sampled of each.

    Args:
        config: as made by `native_config`.
        signs: native name → what `sampled_signs` returned.
    """
    digest = hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode())
    for name in fingerprinted_names(config):
        digest.update(name.encode() + signs[name])
    return digest.hexdigest()


def fingerprinted_names(config: Any) -> list[str]:
    """List the native names that enter, in this order; a tied head is the embedding over again.

    Either format gives the same order: in the official one query, key and value are one tensor, whose codes
    come before its scales.
    """
    table = name_table(base_config(config))
    names = [name for entry in table if not entry.is_copy for name in entry.native]
    if not is_transformers_format(config):
        return names
    runs = itertools.groupby(names, key=lambda name: _PROJECTION.sub("", name))
    return [name for _, run in runs for name in sorted(run, key=_place_in_projection)]


def _place_in_projection(name: str) -> int:
    match = _PROJECTION.search(name)
    return 0 if match is None else _KINDS.index(match[1])  # sorting keeps query, key, value in their order


def sampled_signs(weight: Tensor) -> bytes:
    """Return one byte per sample of a weight: 1 where it is negative."""
    return torch.signbit(_samples(weight)).cpu().numpy().tobytes()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that change with any tensor's name, shape, type or (sampled) values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_samples(tensor).contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def architecture_hash(config: NativeConfig) -> str:
    """Return 16 hexadecimal digits of what a configuration makes of the same weights.

    Args:
        config: as made by `native_config`.
    """
    return hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode()).hexdigest()[:16]


def sample_step(count: int) -> int:
    """Return the distance between samples.

    Odd, while rows are nearly always of even length: an even step would meet the same few columns in every
    row.
    """
    return max(1, count // SAMPLES_PER_TENSOR) | 1


def _samples(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: sample_step(flat.numel())]


def _architecture(config: NativeConfig) -> dict[str, Any]:
    """Return what of an architecture decides its results, under names that never change."""
    if not isinstance(config, NativeConfig):  # another architecture: all that transformers keeps of it
        kept = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPARED}
        return json.loads(json.dumps(kept, default=str))
    if isinstance(config, ChatGlmConfig):
        values = {name: getattr(config, native) for name, native in sorted(FIRST_SIZES.items())}
        values |= {"eps": config.layer_norm_eps, "position_encoding_2d": config.position_encoding_2d}
        values |= {"position_rule": config.position_rule}
    else:
        values = {name: getattr(config, native) for name, native in sorted(SIZES.items())}
        values |= {"kv_heads": config.num_key_value_heads, "qkv_bias": config.attention_bias}
        values |= {"eps": config.rms_norm_eps, "rope_ratio": rope_ratio(config)}
        rope: dict[str, Any] = {**(config.rope_parameters or {})}
        values |= {"rope_type": rope.get("rope_type", "default")}
        # Only what no official release has, so that theirs stay what they were.
        values |= {
            name: value
            for name, value in rope.items()
            if name not in ("rope_type", "rope_theta", "factor")
            and (name, value) != ("partial_rotary_factor", 0.5)
        }
    layout = QuantizedLayout.of(config)
    return values if layout is None else values | {"quantization": layout.identity}
