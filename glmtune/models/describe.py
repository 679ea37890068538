"""The size and shape of a checkpoint, from its configuration and file headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.headers import TensorRecord
from glmtune.models.checkpoints.names import is_derived
from glmtune.models.checkpoints.quantized_layout import (
    INT8_EMBEDDINGS,
    LAYOUT_KEY,
    OUTER_MATRICES,
    QuantizedLayout,
    stored_layout,
)
from glmtune.models.checkpoints.shards import read_records
from glmtune.models.releases.families import NATIVE_TYPES, Family, detect_family, parse_family
from glmtune.models.releases.source import family_of_source, resolve_source
from glmtune.models.tokenizers.load import load_tokenizer_folder, tokenizer_class_of


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What can be said about a checkpoint without reading its weights.

    Attributes:
        source: as the user named it.
        folder: where it lies.
        family: release line.
        model_type: as config.json says: ``chatglm`` is the official format, others are transformers'.
        num_layers: blocks.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        vocab_size: rows of the embedding, padding included.
        max_positions: positions the model was made for, tokens.
        dtype: type of most weights as stored, such as "float16".
        mlp_size: width inside the MLP.
        special_tokens: name → id, or ids.
        tokens_from: where these ids were read: the tokenizer, or config.json where it has no files.
        quantization: method, such as "int4"; "" for floating point weights.
        quantization_bit: 0, 4 or 8, as config.json says.
        quantized_layers: kind of linear layer → how many of it are stored as codes with scales.
        quantized_embeddings: how embedding and head are stored: ``no`` (floating point), ``yes`` (codes of
            the same width) or ``int8`` (INT8 beside layers of any width).
        pre_seq_len: length of the prefix that config.json names or the files hold, else 0.
        prefix_projection: that prefix is re-parameterised through an MLP.
        holds_prefix: its weights are among the files.
        num_parameters: stored numbers, rotary tables left out; packed codes and scales count as stored.
        num_bytes: bytes of these weights.
        files: names of the weight files.
    """

    source: str
    folder: Path
    family: Family
    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: str
    mlp_size: int
    special_tokens: Mapping[str, int | list[int]]
    tokens_from: str
    quantization: str
    quantization_bit: int
    quantized_layers: Mapping[str, int]
    quantized_embeddings: str
    pre_seq_len: int
    prefix_projection: bool
    holds_prefix: bool
    num_parameters: int
    num_bytes: int
    files: tuple[str, ...]


def describe(source: str | Path, *, family: str | Family | None = None) -> ModelDescription:
    """Describe a checkpoint, of any generation and quantized ones too.

    Args:
        source: preset name, hub id under THUDM/ or zai-org/, or a folder.
        family: release line, None to detect it.

    Returns:
        The description; nothing beyond config.json, file headers and tokenizer files was read.

    Raises:
        ConfigError: unknown source or family.
        CheckpointError: files missing or damaged.
    """
    folder = resolve_source(source)
    official = read_config(folder)
    chosen = parse_family(family) if family is not None else family_of_source(source)
    chosen = chosen or detect_family(folder, official)
    records = [record for record in read_records(folder).values() if not is_derived(record.name)]
    bytes_of: dict[str, int] = {}
    for record in records:
        name = str(record.dtype).removeprefix("torch.")
        bytes_of[name] = bytes_of.get(name, 0) + record.num_bytes
    return ModelDescription(
        source=str(source),
        folder=folder,
        family=chosen,
        model_type=str(official.get("model_type")),
        **_sizes(official, chosen),
        dtype=max(bytes_of, key=lambda name: bytes_of[name], default="none"),
        **_tokens(folder, official, chosen),
        **_quantization({record.name: record for record in records}, official, chosen),
        **_prefix({record.name: record for record in records}, official),
        num_parameters=sum(math.prod(record.shape) for record in records),
        num_bytes=sum(bytes_of.values()),
        files=tuple(sorted({record.file.name for record in records})),
    )


def _tokens(folder: Path, official: dict[str, Any], family: Family) -> dict[str, Any]:
    """Read special tokens: by the tokenizer's own names where its files exist, else by keys of config.json.

    The tokenizer's come first, for they are what prompts will hold.
    """
    if (folder / tokenizer_class_of(folder, family).vocab_files_names["vocab_file"]).is_file():
        tokenizer = load_tokenizer_folder(folder, family)
        ids = {name: tokenizer.get_command(name) for name in tokenizer.command_names}
        ids |= {"end": tokenizer.end_id, "pad": tokenizer.pad_token_id}
        return {"special_tokens": ids, "tokens_from": "from the tokenizer"}
    ids = {
        name.removesuffix("_token_id"): official[name]
        for name in ("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        if official.get(name) is not None
    }
    return {"special_tokens": ids, "tokens_from": "from config.json; there are no tokenizer files"}


def _quantization(
    records: dict[str, TensorRecord], official: dict[str, Any], family: Family
) -> dict[str, Any]:
    """Count what has scales beside it, by the last name of its layer."""
    scaled = [name.removesuffix(".weight_scale") for name in records if name.endswith(".weight_scale")]
    kinds = Counter(name.rpartition(".")[2] for name in scaled)
    if official.get("model_type") in NATIVE_TYPES:
        own = official.get(LAYOUT_KEY)
        layout = None if own is None else QuantizedLayout.from_plain(own)
    else:
        layout = stored_layout(official, has_embeddings=family is Family.CHATGLM)
    embeddings = "no"
    if layout is not None and layout.has_int8_embeddings:
        embeddings = INT8_EMBEDDINGS
        kinds = Counter({name: count for name, count in kinds.items() if name not in OUTER_MATRICES})
    elif kinds.pop("word_embeddings", 0):
        embeddings = "yes"
    return {
        "quantization": layout.method if layout else "",
        "quantization_bit": layout.bits if layout else 0,
        "quantized_layers": dict(kinds),
        "quantized_embeddings": embeddings,
    }


def _prefix(records: dict[str, TensorRecord], official: dict[str, Any]) -> dict[str, Any]:
    # Names without the part all become "", which is dropped.
    inside = {name.partition("prefix_encoder.")[2]: record for name, record in records.items()}
    inside.pop("", None)
    length = inside["embedding.weight"].shape[0] if "embedding.weight" in inside else None
    projection = official.get("prefix_projection")
    while isinstance(projection, list) and projection:  # one public copy of the release nests it so
        projection = projection[0]
    return {
        "pre_seq_len": length or int(official.get("pre_seq_len") or 0),
        "prefix_projection": any(name.startswith("trans.") for name in inside) or bool(projection),
        "holds_prefix": bool(inside),
    }


def _sizes(official: dict[str, Any], family: Family) -> dict[str, int]:
    if official.get("model_type") != "chatglm":
        found = {ours: official.get(name) for name, ours in _TRANSFORMERS_SIZES.items()}
        width, heads = found["hidden_size"], found["num_heads"]
        if found["head_dim"] is None and isinstance(width, int) and isinstance(heads, int):
            found["head_dim"] = width // max(1, heads)
        return {name: value if isinstance(value, int) else 0 for name, value in found.items()}
    heads, hidden = int(official.get("num_attention_heads", 0)), int(official.get("hidden_size", 0))
    sizes = {"num_layers": int(official.get("num_layers", 0)), "hidden_size": hidden, "num_heads": heads}
    if family is Family.CHATGLM:
        return sizes | {
            "num_kv_heads": heads,
            "head_dim": hidden // max(1, heads),
            "vocab_size": int(official.get("vocab_size", 0)),
            "max_positions": int(official.get("max_sequence_length", 0)),
            "mlp_size": int(official.get("inner_hidden_size", 0)),
        }
    return sizes | {
        "num_kv_heads": int(official.get("multi_query_group_num", 1))
        if official.get("multi_query_attention", False)
        else heads,
        "head_dim": int(official.get("kv_channels", 0)),
        "vocab_size": int(official.get("padded_vocab_size", 0)),
        "max_positions": int(official.get("seq_length", 0)),
        "mlp_size": int(official.get("ffn_hidden_size", 0)),
    }


_TRANSFORMERS_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "intermediate_size": "mlp_size",
}
