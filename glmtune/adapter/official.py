"""Adapters trained in the releases' own code, whose layers have other names than ours.

The official fine-tuning scripts of ChatGLM3 and GLM-4, LLaMA-Factory and others adapt the layers of the
released Python code: one ``query_key_value`` where transformers' GLM has three layers. An adapter adds
``B A x``, so the three take the same ``A`` and the rows of ``B`` that belong to them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from glmtune.adapter.config import AdapterConfig
from glmtune.models.checkpoints.names import FusedLayout, name_table, split_fused
from glmtune.models.checkpoints.transformers_format import official_form, unofficial

_KIND = ".weight"


def official_layers(config: Any, layers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the linear layers of the released code: each with those of ours that it is.

    Args:
        config: of the model.
        layers: names of its linear layers.
    """
    found = {
        entry.official.removesuffix(_KIND): tuple(name.removesuffix(_KIND) for name in entry.native)
        for entry in name_table(_released(config))
        if entry.official.endswith(_KIND)
    }
    return {name: native for name, native in found.items() if set(native) <= set(layers)}


def named_officially(
    config: AdapterConfig, model_config: Any, layers: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Return the layers of the released code that an adapter changes, each with those of ours that it is."""
    official = official_layers(model_config, layers)
    return {name: official[name] for name in config.adapted(official)}


def official_shapes(
    config: AdapterConfig, adapted: Mapping[str, Sequence[str]], layers: Mapping[str, Any], prefix: str
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that such an adapter has in its file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, native in adapted.items():
        rank, rows = config.rank_of(name), sum(layers[part].out_features for part in native)
        shapes[f"{prefix}{name}.lora_A.weight"] = (rank, layers[native[0]].in_features)
        shapes[f"{prefix}{name}.lora_B.weight"] = (rows, rank)
    return shapes


def to_native(
    weights: Mapping[str, Tensor], adapted: Mapping[str, Sequence[str]], model_config: Any, prefix: str
) -> dict[str, Tensor]:
    """Return the tensors of such an adapter for the layers of ours."""
    layout = FusedLayout.of(_released(model_config))
    found: dict[str, Tensor] = {}
    for name, native in adapted.items():
        shared, rows = (weights[f"{prefix}{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        parts = (rows,) if len(native) == 1 else split_fused(rows, layout)
        for layer, part in zip(native, parts, strict=True):
            found[f"{prefix}{layer}.lora_A.weight"] = shared
            found[f"{prefix}{layer}.lora_B.weight"] = part
    return found


def _released(config: Any) -> Any:
    """Return the configuration that names layers as the released code does, if it has such a model."""
    return config if unofficial(config) else official_form(config)
