"""The sizes of a model that memory depends on, from its name or its config.json; weights are never read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.errors import CheckpointError, ConfigError, unknown_name
from glmtune.models.releases.families import MIXTURES, Family, detect_family, family_of_name, parse_family
from glmtune.models.releases.hub import MODELSCOPE, OWNERS
from glmtune.models.releases.presets import PRESETS


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Sizes of the experts that take the place of the MLP in most blocks.

    Attributes:
        num_experts: E, of which a router chooses.
        num_chosen: experts that compute a token.
        expert_size: width inside an expert (of each of the two halves of SwiGLU).
        shared_size: width inside the MLP that computes every token beside them.
        num_dense: lowest blocks, which have a plain MLP instead.
        num_groups: experts are chosen among those of the best groups only.
        num_chosen_groups: these.
    """

    num_experts: int
    num_chosen: int
    expert_size: int
    shared_size: int
    num_dense: int
    num_groups: int = 1
    num_chosen_groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Sizes of attention whose queries, keys and values are widened from a few numbers (`glm4_moe_lite`).

    Attributes:
        query_rank: numbers that queries are widened from; None: they come from the stream.
        rank: numbers that keys and values are widened from.
        rotary_dim: width of a head's rotated part, one key for all heads.
        plain_dim: width of the rest of a head's queries and keys.
        value_dim: width of a head's values.
    """

    query_rank: int | None
    rank: int
    rotary_dim: int
    plain_dim: int
    value_dim: int


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
        qk_norm: queries and keys have a norm for each head.
        is_tied: embedding and head are one matrix.
        mixture: its experts, where it has some; LoRA is all that is trained then.
        latent: its attention, where that is widened from a few numbers.
        dtype: type of the weights as stored.
        quantization: method of stored codes, None for floating point weights.
        embeddings: method of the codes of embedding and head, None where they are stored in floating point.
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
    qk_norm: bool = False
    is_tied: bool = False
    mixture: Mixture | None = None
    latent: Latent | None = None
    dtype: str = "float16"
    quantization: str | None = None
    embeddings: str | None = None

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Linear layers of one block, of a mixture its attention's: ``(out, in)`` by name."""
        hidden, inner = self.hidden_size, self.mlp_size
        query, shared = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.is_first:
            return {
                "query_key_value": (3 * hidden, hidden),
                "dense": (hidden, hidden),
                "dense_h_to_4h": (inner, hidden),
                "dense_4h_to_h": (hidden, inner),
            }
        if self.latent is not None:
            return self._latent_linears(self.latent)
        attention = {
            "q_proj": (query, hidden),
            "k_proj": (shared, hidden),
            "v_proj": (shared, hidden),
            "o_proj": (hidden, query),
        }
        if self.mixture is not None:
            return attention
        return attention | {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}

    def _latent_linears(self, latent: Latent) -> Mapping[str, tuple[int, int]]:
        query = self.num_heads * (latent.plain_dim + latent.rotary_dim)
        keys_values = self.num_heads * (latent.plain_dim + latent.value_dim)
        queries = (
            {"q_proj": (query, self.hidden_size)}
            if latent.query_rank is None
            else {
                "q_a_proj": (latent.query_rank, self.hidden_size),
                "q_b_proj": (query, latent.query_rank),
            }
        )
        return queries | {
            "kv_a_proj_with_mqa": (latent.rank + latent.rotary_dim, self.hidden_size),
            "kv_b_proj": (keys_values, latent.rank),
            "o_proj": (self.hidden_size, self.num_heads * latent.value_dim),
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
        norms = self.num_norms * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        if self.latent is not None:
            latent = self.latent
            narrow = (latent.query_rank or 0) + latent.rank
            biased = (latent.query_rank or 0) + latent.rank + latent.rotary_dim + self.hidden_size
            return norms + narrow + (biased if self.qkv_bias else 0)
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.qkv_bias else 0
        return norms + biases

    @property
    def experts_size(self) -> int:
        """Numbers in the experts of a block, its router and the MLP beside them; 0 without a mixture."""
        if self.mixture is None:
            return 0
        widths = self.mixture.num_experts * self.mixture.expert_size + self.mixture.shared_size
        return self.hidden_size * (3 * widths + self.mixture.num_experts)

    @property
    def block_size(self) -> int:
        """Numbers in the largest block."""
        return self.block_linear_size + self.block_other_size + self.experts_size

    @property
    def embedding_size(self) -> int:
        """Numbers in the embedding; the head, unless tied, has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def outer_size(self) -> int:
        """Numbers in embedding and head together."""
        return self.embedding_size * (1 if self.is_tied else 2)

    @property
    def final_norm_size(self) -> int:
        """Numbers in the norm after the last block."""
        return self.hidden_size * (2 if self.is_first else 1)

    @property
    def num_parameters(self) -> int:
        """Numbers in the whole model, before quantization."""
        outer = self.outer_size + self.final_norm_size
        blocks = self.num_layers * self.block_size
        if self.mixture is not None:  # the lowest ones have a plain MLP
            blocks += self.mixture.num_dense * (3 * self.mlp_size * self.hidden_size - self.experts_size)
        return outer + blocks


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
        geometry = dataclasses.replace(
            geometry, is_tied=True, quantization=None, embeddings=None, dtype="float32"
        )
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
    if official.get("model_type") in MIXTURES:
        return _of_mixture(source, folder)
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
        embeddings=None if layout is None else layout.embeddings_method,
    )


def _of_mixture(source: str, folder: Path) -> Geometry:
    """Read the sizes of a mixture of experts, whose config.json transformers explains."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot read config.json ({str(error)[:200]}). Download it again."
        ) from error
    is_latent = config.model_type == "glm4_moe_lite"
    latent = (
        Latent(
            query_rank=config.q_lora_rank,
            rank=config.kv_lora_rank,
            rotary_dim=config.qk_rope_head_dim,
            plain_dim=config.qk_nope_head_dim,
            value_dim=config.v_head_dim,
        )
        if is_latent
        else None
    )
    num_dense = config.mlp_layer_types.count("dense") if is_latent else config.first_k_dense_replace
    return Geometry(
        name=source,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        qkv_bias=bool(config.attention_bias),
        qk_norm=bool(getattr(config, "use_qk_norm", False)),
        is_tied=bool(config.tie_word_embeddings),
        mixture=Mixture(
            num_experts=config.n_routed_experts,
            num_chosen=config.num_experts_per_tok,
            expert_size=config.moe_intermediate_size,
            shared_size=config.moe_intermediate_size * config.n_shared_experts,
            num_dense=min(num_dense, config.num_hidden_layers),
            num_groups=config.n_group,
            num_chosen_groups=config.topk_group,
        ),
        latent=latent,
        dtype=str(config.dtype or "bfloat16").removeprefix("torch."),
    )
