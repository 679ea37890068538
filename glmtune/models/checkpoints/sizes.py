"""Whether the sizes in a config.json are those of the weights beside it, before anything is built of them.

A config.json of 1 KB may ask for a million blocks or a width of a billion. Weights are on disk already: what
their headers show is of a size that somebody stored, so a model is built only where the two agree. Where
there are no weights (a model made from scratch), memory is the bound.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from glmtune.errors import ConfigError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.config import FIRST_SIZES, SIZES, NativeConfig
from glmtune.models.checkpoints.headers import TensorRecord
from glmtune.models.checkpoints.names import NATIVE_LAYER, FusedLayout, name_table
from glmtune.models.checkpoints.transformers_format import is_transformers_format

GIB = 2**30
_BLOCK = re.compile(r"(transformer\.(?:encoder\.)?layers|model\.layers)\.(\d{1,9})\.")


def size_problems(records: Mapping[str, TensorRecord], config: NativeConfig) -> list[str]:
    """Compare the sizes of a configuration with the shapes that the headers of the weights show.

    Only lengths that codes have in common with floating point weights are looked at: rows and norms.

    Args:
        records: of the weight files.
        config: as made by `native_config`.

    Returns:
        One sentence per size that differs, by its official name.
    """
    if is_transformers_format(config):
        return _transformers_problems(records, config)
    is_first = isinstance(config, ChatGlmConfig)
    blocks = "transformer.layers" if is_first else "transformer.encoder.layers"
    embedding = "transformer.word_embeddings" if is_first else "transformer.embedding.word_embeddings"
    attention = "attention" if is_first else "self_attention"
    official = {native: name for name, native in (FIRST_SIZES if is_first else SIZES).items()}
    gates = 1 if is_first else 2  # later generations: gate and up in one matrix

    def asked(native: str) -> tuple[str, int]:
        return official[native], getattr(config, native)

    found: list[tuple[str, int, str, int | None]] = [
        (*asked("num_hidden_layers"), "blocks", _num_blocks(records, blocks)),
        (*asked("vocab_size"), "rows of the embedding", _rows(records, f"{embedding}.weight")),
        (*asked("hidden_size"), "numbers of a norm", _rows(records, f"{blocks}.0.input_layernorm.weight")),
    ]
    inner = _rows(records, f"{blocks}.0.mlp.dense_h_to_4h.weight")
    width = inner if inner is None or inner % gates else inner // gates
    found.append((*asked("intermediate_size"), "rows of the MLP", width))
    fused = sum(FusedLayout.of(config).rows)
    keys = "hidden_size" if is_first else "num_attention_heads, kv_channels and multi_query_group_num"
    rows = _rows(records, f"{blocks}.0.{attention}.query_key_value.weight")
    found.append((f"the product of {keys}", fused, "rows of query_key_value", rows))
    return _differing(found)


def _transformers_problems(records: Mapping[str, TensorRecord], config: Any) -> list[str]:
    """Compare the sizes of a checkpoint in transformers' format."""
    heads, keys, _ = FusedLayout.of(config).rows

    def rows(name: str) -> int | None:
        return _rows(records, f"{NATIVE_LAYER}.0.{name}.weight")

    gates = rows("mlp.gate_up_proj")
    width = gates if gates is None or gates % 2 else gates // 2
    embedding = _rows(records, "model.embed_tokens.weight")
    found = [
        ("num_hidden_layers", config.num_hidden_layers, "blocks", _num_blocks(records, NATIVE_LAYER)),
        ("vocab_size", config.vocab_size, "rows of the embedding", embedding),
        ("hidden_size", config.hidden_size, "numbers of a norm", rows("input_layernorm")),
        ("intermediate_size", config.intermediate_size, "rows of the MLP", width),
        ("num_attention_heads * head_dim", heads, "rows of q_proj", rows("self_attn.q_proj")),
        ("num_key_value_heads * head_dim", keys, "rows of k_proj", rows("self_attn.k_proj")),
    ]
    return _differing(found)


def _differing(found: Sequence[tuple[str, int, str, int | None]]) -> list[str]:
    return [
        f"config.json: {name} is {value}, but the weights have {number} {of}"
        for name, value, of, number in found
        if number is not None and number != value
    ]


def _num_blocks(records: Mapping[str, TensorRecord], blocks: str) -> int:
    matches = filter(None, map(_BLOCK.match, records))
    return len({match[2] for match in matches if match[1] == blocks})


def _rows(records: Mapping[str, TensorRecord], name: str) -> int | None:
    record = records.get(name)
    return record.shape[0] if record is not None and record.shape else None


def num_parameters(config: NativeConfig) -> int:
    """Count the numbers of a model without listing its tensors; a tied head counts once.

    Args:
        config: as made by `native_config`, without a quantized layout.
    """

    def of_layers(count: int) -> int:
        some = copy.copy(config)
        some.num_hidden_layers = count
        return sum(math.prod(entry.shape) for entry in name_table(some) if not entry.is_copy)

    one, two = of_layers(1), of_layers(2)
    return one + (config.num_hidden_layers - 1) * (two - one)


def check_memory(config: NativeConfig, source: object) -> None:
    """Refuse to make a model of float32 weights that this machine cannot hold.

    Args:
        config: see `num_parameters`.
        source: what the user named, for the message.

    Raises:
        ConfigError: with the estimate.
    """
    needed = 4 * num_parameters(config)
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > there:
        raise ConfigError(
            f"The model of `{source}` made from scratch has {num_parameters(config):,} parameters "
            f"({config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary "
            f"{config.vocab_size}): {needed / GIB:,.1f} GiB in float32 for the weights alone, and this "
            f"machine has {there / GIB:,.1f} GiB. Lower num_layers, hidden_size or the vocabulary in its "
            "config.json."
        )
