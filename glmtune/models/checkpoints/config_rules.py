"""Read a config.json and check its values, in either format; a wrong one is named before anything is built.

Without PyTorch, so that plans, checks of data and tokenizers need none.

Without this, a damaged value would surface as a TypeError deep inside a layer, and a huge one as a machine
that swaps: every size has a bound far above the releases' own (the largest has 40 layers of 4,096), so that
whatever is computed of a configuration (plans, tables of names) takes a moment. That the sizes are those of
the weights is a question of its own: `glmtune.models.checkpoints.sizes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.quantized_layout import INT8_EMBEDDINGS, LAYOUT_KEY
from glmtune.models.releases.families import NATIVE_TYPES, is_known_to_transformers
from glmtune.storage.json_files import read_json_object, shown
from glmtune.tuned_files import found_instead


def _is_whole(value: object, *, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high  # True is an int


def _is_number(value: object, high: float) -> bool:
    # Compared before it is made a float: an integer of 400 digits is none. 1e999 is JSON, and infinite.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= high and math.isfinite(value)


def _is_id(value: object) -> bool:
    return value is None or _is_whole(value, low=0, high=MAX_WIDTH)


def _is_ids(value: object) -> bool:
    return _is_id(value) or (isinstance(value, list) and bool(value) and all(map(_is_id, value)))


Rule = tuple[str, Callable[[Any], bool]]
MAX_LAYERS, MAX_WIDTH, MAX_POSITIONS, MAX_PREFIX = 10_000, 2**24, 2**31, 2**20


def _count(high: int) -> Rule:
    return f"a whole number from 1 to {high}", lambda value: _is_whole(value, low=1, high=high)


WIDTH = _count(MAX_WIDTH)
TOKEN: Rule = ("a token id (0 or more) or null", _is_id)
TOKENS: Rule = ("a token id (0 or more), a list of them, or null", _is_ids)
SCALE: Rule = ("a number above 0, at most 1e9", lambda value: _is_number(value, 1e9) and value > 0)
FRACTION: Rule = ("a number from 0 to 1", lambda value: _is_number(value, 1))
SWITCH: Rule = ("true or false", lambda value: isinstance(value, bool))
OPTIONAL_SWITCH: Rule = ("true, false or null", lambda value: value is None or isinstance(value, bool))
BITS: Rule = (
    "4 or 8 (0 or null: not quantized)",
    lambda value: value is None or (_is_whole(value, low=0, high=8) and value in (0, 4, 8)),
)
LENGTH: Rule = (
    f"a length from 0 to {MAX_PREFIX}, or null",
    lambda value: value is None or _is_whole(value, low=0, high=MAX_PREFIX),
)
ROPE: Rule = ("an object of names and numbers above 0, or null", lambda value: _is_rope(value))
LAYOUT: Rule = ("the object that glmtune writes when it quantizes", lambda value: _is_layout(value))

RULES: dict[str, Rule] = {
    **dict.fromkeys(("num_layers", "num_hidden_layers"), _count(MAX_LAYERS)),
    **dict.fromkeys(
        ("hidden_size", "inner_hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads",
         "multi_query_group_num", "vocab_size", "padded_vocab_size", "intermediate_size", "head_dim",
         "num_key_value_heads"),
        WIDTH,
    ),
    **dict.fromkeys(
        ("max_sequence_length", "seq_length", "max_position_embeddings"), _count(MAX_POSITIONS)
    ),
    **dict.fromkeys(("mask_token_id", "gmask_token_id", "bos_token_id", "pad_token_id"), TOKEN),
    "eos_token_id": TOKENS,
    **dict.fromkeys(("layernorm_epsilon", "rope_ratio", "rms_norm_eps", "rope_theta"), SCALE),
    **dict.fromkeys(("attention_dropout", "partial_rotary_factor", "initializer_range"), FRACTION),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), ROPE),
    **dict.fromkeys(
        ("add_qkv_bias", "multi_query_attention", "position_encoding_2d", "use_cache",
         "attention_bias"),
        SWITCH,
    ),
    "pre_seq_len": LENGTH,
    "quantization_bit": BITS,
    "quantization_embeddings": OPTIONAL_SWITCH,
    LAYOUT_KEY: LAYOUT,
}  # fmt: skip
"""Official key → what its value must be, in words and as a test."""

_LAYOUT_FIELDS: dict[str, Callable[[Any], bool]] = {
    "bits": lambda value: _is_whole(value, low=1, high=8),
    "group_size": lambda value: value is None or _is_whole(value, low=1, high=MAX_WIDTH),
    "has_zero": lambda value: isinstance(value, bool),
    "embeddings": lambda value: isinstance(value, bool) or value == INT8_EMBEDDINGS,
    "skipped": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "method": lambda value: isinstance(value, str),
    "source_fingerprint": lambda value: isinstance(value, str),
    "outer_signs": lambda value: (
        isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
    ),
}


def _is_rope(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(
        part is None or isinstance(part, str | bool) or (_is_number(part, 1e9) and part > 0)
        for part in value.values()
    )


def _is_layout(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and "bits" in value
        and all(name in _LAYOUT_FIELDS and _LAYOUT_FIELDS[name](part) for name, part in value.items())
    )


def value_problems(official: Mapping[str, Any]) -> list[str]:
    """Describe every value that no release could have.

    Args:
        official: content of config.json.

    Returns:
        One sentence per wrong value, in the order of the file; keys without a rule are not looked at.

    >>> value_problems({"num_layers": "28", "hidden_size": 4096})
    ["num_layers is '28', but must be a whole number from 1 to 10000"]
    """
    return [
        f"{key} is {shown(value)}, but must be {RULES[key][0]}"
        for key, value in official.items()
        if key in RULES and not RULES[key][1](value)
    ]


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises:
        CheckpointError: the file is absent, no JSON object, or holds values that no release could have.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, which every official checkpoint has. "
            f"{found_instead(folder, 'model')}Point `model.source` at the folder that holds config.json and "
            "the weights."
        )
    content = read_json_object(file)
    if is_other(content):  # transformers' own classes check it
        return content
    problems = value_problems(content)
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise CheckpointError(f"{file} cannot be used:\n{listed}\nCorrect it, or download it again.")
    return content


def is_other(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of an architecture that transformers computes and glmtune does not."""
    kind = content.get("model_type")
    return kind not in ("chatglm", *NATIVE_TYPES) and is_known_to_transformers(kind)


def stored_context_tokens(content: Mapping[str, Any]) -> int | None:
    """Return the positions that a config.json names; None where it leaves them to its release.

    Args:
        content: of the file, as `read_config` returns it.
    """
    names = ("seq_length", "max_sequence_length", "max_position_embeddings")
    return next((int(content[name]) for name in names if name in content), None)
