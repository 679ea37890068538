"""Which values an official config.json may hold; a wrong one is named before anything is built.

Without this, a damaged value would surface as a TypeError deep inside a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _is_whole(value: object, *, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low  # True is an int in Python


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return value is None or _is_whole(value, low=0)


def _is_ids(value: object) -> bool:
    return _is_id(value) or (isinstance(value, list) and bool(value) and all(map(_is_id, value)))


Rule = tuple[str, Callable[[Any], bool]]
COUNT: Rule = ("a whole number of at least 1", lambda value: _is_whole(value, low=1))
TOKEN: Rule = ("a token id (0 or more) or null", _is_id)
TOKENS: Rule = ("a token id (0 or more), a list of them, or null", _is_ids)
SCALE: Rule = ("a number above 0", lambda value: _is_number(value) and value > 0)
FRACTION: Rule = ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
SWITCH: Rule = ("true or false", lambda value: isinstance(value, bool))
LENGTH: Rule = ("a length (0 or more) or null", _is_id)

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("hidden_size", "inner_hidden_size", "ffn_hidden_size", "kv_channels", "num_layers",
         "num_hidden_layers", "num_attention_heads", "multi_query_group_num", "vocab_size",
         "padded_vocab_size", "max_sequence_length", "seq_length"),
        COUNT,
    ),
    **dict.fromkeys(("mask_token_id", "gmask_token_id", "bos_token_id", "pad_token_id"), TOKEN),
    "eos_token_id": TOKENS,
    "layernorm_epsilon": SCALE,
    "rope_ratio": SCALE,
    "attention_dropout": FRACTION,
    **dict.fromkeys(
        ("add_qkv_bias", "multi_query_attention", "position_encoding_2d", "use_cache"),
        SWITCH,
    ),
    "pre_seq_len": LENGTH,
}  # fmt: skip
"""Official key → what its value must be, in words and as a test."""


def value_problems(official: Mapping[str, Any]) -> list[str]:
    """Describe every value that no release could have.

    Args:
        official: content of config.json.

    Returns:
        One sentence per wrong value, in the order of the file; keys without a rule are not looked at.

    >>> value_problems({"num_layers": "28", "hidden_size": 4096})
    ["num_layers is '28', but must be a whole number of at least 1"]
    """
    return [
        f"{key} is {value!r}, but must be {RULES[key][0]}"
        for key, value in official.items()
        if key in RULES and not RULES[key][1](value)
    ]
