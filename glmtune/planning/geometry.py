"""The sizes of a model that memory depends on, from its name or its config.json; weights are never read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmtune.errors import ConfigError, unknown_name
from glmtune.models.releases.families import Family, detect_family, family_of_name, parse_family
from glmtune.models.releases.hub import MODELSCOPE, OWNERS
from glmtune.models.releases.presets import PRESETS


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes of a GLM.

    Attributes:
        name: what the user named.
        is_first: ChatGLM-6B's block (LayerNorm, biases, plain MLP, embedding tied to the head); otherwise
            that of all later ones (RMSNorm, shared key/value heads, SwiGLU).
        num_layers: L.
        hidden_size: D.
        mlp_size: F, width inside the MLP (of each of the two halves of SwiGLU).
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        vocab_size: V, padding rows included.
        num_norms: norms of a block; GLM-4-0414 has four.
        qkv_bias: biases on queries, keys and values (the first generation has biases everywhere).
        is_tied: embedding and head are one matrix.
        dtype: type of the weights as stored.
        quantization: method of stored codes, None for floating point weights.
    """

    name: str
    is_first: bool = False
    num_layers: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_norms: int = 2
    qkv_bias: bool = True
    is_tied: bool = False
    dtype: str = "float16"
    quantization: str | None = None

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Linear layers of one block, by the model's own names: ``(out, in)``."""
        hidden, inner = self.hidden_size, self.mlp_size
        query, shared = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.is_first:
            return {
                "query_key_value": (3 * hidden, hidden),
                "dense": (hidden, hidden),
                "dense_h_to_4h": (inner, hidden),
                "dense_4h_to_h": (hidden, inner),
            }
        return {
            "q_proj": (query, hidden),
            "k_proj": (shared, hidden),
            "v_proj": (shared, hidden),
            "o_proj": (hidden, query),
            "gate_up_proj": (2 * inner, hidden),
            "down_proj": (hidden, inner),
        }

    @property
    def block_linear_size(self) -> int:
        """Numbers in the weights of a block's linear layers, the ones that quantization turns into codes."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def block_other_size(self) -> int:
        """Numbers in a block's norms and biases."""
        if self.is_first:
            return 4 * self.hidden_size + sum(rows for rows, _ in self.linears.values())
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.qkv_bias else 0
        return self.num_norms * self.hidden_size + biases

    @property
    def embedding_size(self) -> int:
        """Numbers in the embedding; the head, unless tied, has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def final_norm_size(self) -> int:
        """Numbers in the norm after the last block."""
        return self.hidden_size * (2 if self.is_first else 1)

    @property
    def num_parameters(self) -> int:
        """Numbers in the whole model, before quantization."""
        outer = self.embedding_size * (1 if self.is_tied else 2) + self.final_norm_size
        return outer + self.num_layers * (self.block_linear_size + self.block_other_size)


_FIRST = Geometry(
    name="chatglm-6b",
    is_first=True,
    num_layers=28,
    hidden_size=4096,
    mlp_size=16384,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=130528,
    is_tied=True,
)
_SECOND = Geometry(
    name="chatglm2-6b",
    num_layers=28,
    hidden_size=4096,
    mlp_size=13696,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=65024,
)
_FOURTH = dataclasses.replace(_SECOND, name="glm-4-9b", num_layers=40, vocab_size=151552, dtype="bfloat16")
# Written down so that a plan needs no download; tests compare the numbers of parameters with the published
# ones.
_OF_FAMILY = {
    Family.CHATGLM: _FIRST,
    Family.CHATGLM2: _SECOND,
    Family.CHATGLM2_32K: _SECOND,
    Family.CODEGEEX2: dataclasses.replace(_SECOND, dtype="bfloat16"),
    Family.CHATGLM3: _SECOND,
    Family.CHATGLM3_32K: _SECOND,
    Family.GLM4: _FOURTH,
}
_WIDER = {"glm-4-9b-chat-1m": dataclasses.replace(_FOURTH, num_kv_heads=4)}
"""Sizes in the config.json of the releases on the hub; the 1M release has four key/value heads."""

_APRIL_9B = dataclasses.replace(_FOURTH, num_norms=4)
_APRIL_32B = Geometry(
    name="glm-4-32b-0414",
    num_layers=61,
    hidden_size=6144,
    mlp_size=23040,
    num_heads=48,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=151552,
    num_norms=4,
    qkv_bias=False,
    dtype="bfloat16",
)
_EDGE_1_5B = Geometry(
    name="glm-edge-1.5b-chat",
    num_layers=28,
    hidden_size=2048,
    mlp_size=6144,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=59264,
    qkv_bias=False,
    dtype="bfloat16",
)
_EDGE_4B = dataclasses.replace(
    _EDGE_1_5B, num_layers=40, hidden_size=3072, mlp_size=8192, num_heads=24, num_kv_heads=6
)
_OF_NAME = {
    "glm-4-9b-chat-hf": _FOURTH,
    "glm-4-9b-hf": _FOURTH,
    "glm-4-9b-0414": _APRIL_9B,
    "glm-z1-9b-0414": _APRIL_9B,
    "glm-4-32b-0414": _APRIL_32B,
    "glm-4-32b-base-0414": _APRIL_32B,
    "glm-z1-32b-0414": _APRIL_32B,
    "glm-edge-1.5b-chat": _EDGE_1_5B,
    "glm-edge-4b-chat": _EDGE_4B,
}
"""Releases in transformers' format, whose sizes no release line tells; names in lower case."""


def read_geometry(source: str, *, family: str | None = None, from_scratch: bool = False) -> Geometry:
    """Find the sizes of a model; nothing is downloaded.

    Args:
        source: preset name, hub id, ``modelscope:NAME``, or a folder with a config.json.
        family: release line, only where no name tells it.
        from_scratch: head and embedding are one matrix while a model is made from random weights.

    Raises:
        ConfigError: no known release and no folder; nearest names first.
        CheckpointError: the folder's config.json cannot be used.
    """
    folder = _folder(source)
    geometry = _from_folder(source, folder, family) if folder is not None else _from_name(source)
    if from_scratch:
        geometry = dataclasses.replace(geometry, is_tied=True, quantization=None, dtype="float32")
    return geometry


def _folder(source: str) -> Path | None:
    from glmtune.models.releases.source import resolve_source

    if source in PRESETS:
        return None if PRESETS[source].hub_id else resolve_source(source)
    place = Path(source).expanduser()
    return place if place.is_dir() else None


def _from_name(source: str) -> Geometry:
    """Tell a release by its name; the sizes of the releases are known."""
    owner, _, name = source.removeprefix(MODELSCOPE).rpartition("/")
    family = Family.CHATGLM if re.fullmatch(r"chatglm-6b(-int[48])?", name) else family_of_name(name)
    is_release = owner in ("", "ZhipuAI", *OWNERS) and (owner or name.partition("-int")[0] in PRESETS)
    known = _OF_NAME.get(name.lower()) if family is Family.TRANSFORMERS else None
    if known is not None and is_release:
        return dataclasses.replace(known, name=source)
    if family is None or family is Family.TRANSFORMERS or not is_release:
        raise ConfigError(
            unknown_name("`model.source`", source, [n for n in PRESETS])
            + " Sizes of other models are read from a folder with their config.json; weights are not needed."
        )
    bits = re.search(r"-int([48])$", name)
    method = None if bits is None else f"int{bits[1]}"
    return dataclasses.replace(_WIDER.get(name, _OF_FAMILY[family]), name=source, quantization=method)


def _from_folder(source: str, folder: Path, family: str | None) -> Geometry:
    from glmtune.models.architectures.chatglm_config import ChatGlmConfig
    from glmtune.models.checkpoints.config import native_config
    from glmtune.models.checkpoints.config_rules import read_config
    from glmtune.models.checkpoints.quantized_layout import QuantizedLayout

    official = read_config(folder)
    chosen = detect_family(folder, official) if family is None else parse_family(family)
    config = native_config(official, chosen)
    layout = QuantizedLayout.of(config)
    is_first = isinstance(config, ChatGlmConfig)
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    assert kv_heads is not None
    assert head_dim is not None
    return Geometry(
        name=source,
        is_first=is_first,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        num_norms=4 if config.model_type == "glm4" else 2,
        qkv_bias=is_first or bool(getattr(config, "attention_bias", False)),
        is_tied=is_first or bool(config.tie_word_embeddings),
        dtype=str(config.dtype or "float16").removeprefix("torch."),
        quantization=None if layout is None else layout.method or f"int{layout.bits}",
    )
