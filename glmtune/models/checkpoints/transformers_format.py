"""config.json in transformers' own format: releases named -hf or 0414, GLM-Edge, exports of glmtune.

The weights have the names of the model itself here, and the file the keys of transformers' configuration
classes. As those classes ignore what they do not know, so do we, except for a key that says that the weights
are not plain ones. What is added is the family (so that an export keeps the prompts of its source), the
layout of codes, and that the checkpoint is of this format, which decides how it is saved again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Glm4Config, GlmConfig

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.config_rules import value_problems
from glmtune.models.checkpoints.quantized_layout import LAYOUT_KEY, OUR_CODES, QuantizedLayout
from glmtune.models.releases.families import FAMILY_KEY, SECOND_GENERATION, Family, family_of_config
from glmtune.storage.json_files import shown

FORMAT_KEY = "glmtune_stored_as"
"""Attribute we give to native configurations of checkpoints in transformers' format."""
TRANSFORMERS = "transformers"
PER_HEAD_KEY = "fused_per_head"
"""Attribute we give to native configurations; official files say it as ``multi_query_attention``."""

CONFIG_CLASSES: dict[str, type[GlmConfig] | type[Glm4Config]] = {"glm": GlmConfig, "glm4": Glm4Config}
"""model_type → class. They differ in two norms per block (``glm4``)."""
MODEL_CLASSES = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM"}

SIZES = (
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""Keys that must be present: transformers would take those of its 9B model for what is missing."""
READ = (
    *SIZES,
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "pad_token_id",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "use_cache",
)
ROPE_BASE = 10000.0
"""Of every official release, whose files hold only a factor to it, or to the positions, in ``rope_ratio``."""
ROPE_TYPES = ("default", "linear", "yarn")
REFUSED = {
    "quantization_config": "the weights are codes of another tool; load the release they were made from, and "
    "quantize it on loading (`quantization=int4`)",
}
"""Keys that change what the weights mean → what to do instead."""


def is_transformers_format(config: object) -> bool:
    """Whether a native configuration is of a checkpoint in transformers' format."""
    return getattr(config, FORMAT_KEY, None) == TRANSFORMERS


def transformers_config(values: Mapping[str, Any], family: Family) -> GlmConfig | Glm4Config:
    """Make the native configuration of a config.json in transformers' format.

    Args:
        values: content of the file.
        family: release line; decides tokenizer and prompts.

    Returns:
        transformers' own configuration with `glmtune_family`, the format, and the layout of codes, if any.

    Raises:
        CheckpointError: missing or wrong values, or codes of another tool; everything is named.
    """
    problems = [
        f"{name} is missing; every file of this format has it" for name in SIZES if name not in values
    ]
    problems += value_problems({name: values[name] for name in values if name in {*READ, LAYOUT_KEY}})
    problems += [f"`{name}`: {instead}" for name, instead in REFUSED.items() if _is_foreign(values, name)]
    problems += [] if problems else _relation_problems(values)
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise CheckpointError(f"config.json cannot be used:\n{listed}")
    given = {name: values[name] for name in READ if values.get(name) is not None}
    ours: dict[str, Any] = {
        FAMILY_KEY: family.value,
        FORMAT_KEY: TRANSFORMERS,
        "dtype": values.get("dtype", values.get("torch_dtype")),
    }
    config = CONFIG_CLASSES[values["model_type"]](**given, **ours)
    if config.pad_token_id is None:
        ends: Any = config.eos_token_id
        config.pad_token_id = ends if isinstance(ends, int) else ends[0]
    if values.get(LAYOUT_KEY) is not None:
        QuantizedLayout.from_plain(values[LAYOUT_KEY]).put_into(config)
    return config


def _is_foreign(values: Mapping[str, Any], name: str) -> bool:
    is_ours = values.get(name) == OUR_CODES and values.get(LAYOUT_KEY) is not None
    return bool(values.get(name)) and not is_ours


def _relation_problems(values: Mapping[str, Any]) -> list[str]:
    """Describe values that are right by themselves, but not together."""
    problems: list[str] = []
    heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % shared:
        problems.append(f"num_key_value_heads is {shared}, but it must divide num_attention_heads, {heads}")
    if values.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {shown(values['hidden_act'])}, but every GLM has `silu`")
    stored = values.get("dtype", values.get("torch_dtype"))
    if stored not in (None, "float32", "bfloat16", "float16"):
        problems.append(f"dtype is {shown(stored)}, but must be float32, bfloat16 or float16")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        problems.append(f"rope_type is {shown(kind)}, but must be one of {', '.join(ROPE_TYPES)}")
    ends = values.get("eos_token_id")
    ids = [*(ends if isinstance(ends, list) else [ends]), values.get("pad_token_id")]
    above = [index for index in ids if index is not None and index >= values["vocab_size"]]
    if above:
        problems.append(f"eos_token_id or pad_token_id is {above[0]}, but vocab_size {values['vocab_size']}")
    return problems


def transformers_values(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json in transformers' format, readable by transformers 4 and 5 alike.

    Args:
        config: `GlmConfig` or `Glm4Config` as made by `native_config`.
        dtype: floating type of the weights.
    """
    stored = config.to_dict()
    values = {name: stored[name] for name in READ if name in stored} | {"model_type": config.model_type}
    rope, name = values["rope_parameters"], str(dtype).removeprefix("torch.")
    values |= {"architectures": [MODEL_CLASSES[config.model_type]], "dtype": name, "torch_dtype": name}
    values |= {"use_cache": True, FAMILY_KEY: getattr(config, FAMILY_KEY)}
    # transformers 4 and engines written for it read these keys instead of rope_parameters.
    values |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    if rope["rope_type"] != "default":
        kept = ("rope_theta", "partial_rotary_factor")
        values["rope_scaling"] = {key: value for key, value in rope.items() if key not in kept}
    layout = QuantizedLayout.of(config)
    if layout is not None:
        values |= {LAYOUT_KEY: getattr(config, LAYOUT_KEY), "quantization_config": OUR_CODES}
    return dict(sorted(values.items()))


def official_form(config: Any) -> Any:
    """Return the configuration of the same model with its weights in the official layout.

    Args:
        config: as made by `native_config`, of any format.

    Raises:
        CheckpointError: the official layout cannot hold this model; the reasons are named.
    """
    if not is_transformers_format(config):
        return config
    if problems := unofficial(config):
        raise CheckpointError(f"The official layout cannot hold this model: {'; '.join(problems)}.")
    found = copy.copy(config)
    vars(found).pop(FORMAT_KEY)
    # Where no heads are shared, the released code orders the rows head by head.
    setattr(found, PER_HEAD_KEY, config.num_key_value_heads == config.num_attention_heads)
    return found


def unofficial(config: Any) -> list[str]:
    """Name what a model in transformers' format has and the official layout has no place for."""
    if not is_transformers_format(config):
        return []
    rope: dict[str, Any] = {**(config.rope_parameters or {})}
    family, kind = family_of_config(config), rope.get("rope_type", "default")
    layout = QuantizedLayout.of(config)
    found = {
        "two more norms per block (`model_type` glm4), which no release of that layout has": isinstance(
            config, Glm4Config
        ),
        "a head tied to the embedding": bool(config.tie_word_embeddings),
        f"rotary positions on {rope.get('partial_rotary_factor', 1):g} of each head instead of half": (
            rope.get("partial_rotary_factor") != 0.5
        ),
        f"rotary scaling of the kind {shown(kind)}": not (
            kind == "default" or (kind == "linear" and family in SECOND_GENERATION)
        ),
        "a rotary base that is a factor of the positions in this family": (
            family in SECOND_GENERATION and rope.get("rope_theta", ROPE_BASE) != ROPE_BASE
        ),
        "layers left out of quantization by their names": layout is not None and bool(layout.skipped),
    }
    return [problem for problem, is_there in found.items() if is_there]
