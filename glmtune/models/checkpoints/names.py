"""Two-way tables between official parameter names and those of the native models.

`GlmForCausalLM` has other names and a cut fused projection; `ChatGlmForCausalLM` has the official names. One
table, `name_table`, serves reading, writing, exporting, quantizing and fingerprints, so none of them can
forget a tensor.

Rows of the fused projection ``query_key_value`` are in one of two orders, which have the same shape::

    later generations, grouped heads          first generation (and later ones without grouped heads)
    q q q q q q q q | k k | v v               q k v | q k v | q k v | q k v
    all queries, all keys, all values         head by head

Shapes: H hidden, N query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Glm4Config, GlmConfig

from glmtune.errors import CheckpointError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.config import NativeConfig, fused_per_head
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.transformers_format import is_transformers_format

OUTER = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
"""Same tensor, other name; the fused query/key/value projection is the only one that is cut."""

OFFICIAL_LAYER = "transformer.encoder.layers"
NATIVE_LAYER = "model.layers"


@dataclass(frozen=True, slots=True)
class Entry:
    """One official tensor and where its rows go.

    Attributes:
        official: name in the checkpoint.
        native: name in the model, or the three names of query, key and value in this order.
        shape: shape of the official tensor.
        is_copy: it repeats an earlier tensor (a tied head): written, as the releases do, but never needed.
        is_codes: integers of a quantized layer, whose scales are an entry of their own.
    """

    official: str
    native: tuple[str, ...]
    shape: tuple[int, ...]
    is_copy: bool = False
    is_codes: bool = False


@dataclass(frozen=True, slots=True)
class FusedLayout:
    """How the rows of the fused query/key/value projection are ordered.

    Attributes:
        num_heads: query heads N.
        num_kv_heads: key/value heads K.
        head_dim: rows per head D.
        per_head: rows are [head][query, key, value][D] (K = N), otherwise all queries, all keys, all values.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    per_head: bool

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of query, key and value."""
        shared = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, shared, shared

    @classmethod
    def of(cls, config: NativeConfig) -> FusedLayout:
        """Read the layout from a configuration made by `native_config`.

        Raises:
            CheckpointError: see `fused_per_head`.
        """
        num_kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        assert num_kv_heads is not None
        assert head_dim is not None
        return cls(config.num_attention_heads, num_kv_heads, head_dim, fused_per_head(config))


def name_table(config: NativeConfig) -> tuple[Entry, ...]:
    """List every tensor that a checkpoint of this configuration holds, embedding first, head last.

    Args:
        config: as made by `native_config`.

    Returns:
        One entry per official tensor, in the order of the forward pass; a quantized layer has one for its
        codes and one for each tensor of scales.

    Raises:
        CheckpointError: codes of 4 bits for an odd number of columns.
    """
    if isinstance(config, ChatGlmConfig):
        plain = _first_generation(config)
    elif is_transformers_format(config):
        plain = _in_transformers_format(config)
    else:
        plain = _later_generations(config)
    layout = QuantizedLayout.of(config)
    return plain if layout is None else tuple(stored for entry in plain for stored in _stored(entry, layout))


def written_table(config: NativeConfig) -> tuple[Entry, ...]:
    """List the tensors that we write into a checkpoint: `name_table`, as others of its format have it.

    The releases of ChatGLM-6B store their tied head, transformers does not: what it finds there it takes for
    a head of its own if a number differs.
    """
    table = name_table(config)
    return tuple(entry for entry in table if not (entry.is_copy and is_transformers_format(config)))


def _stored(entry: Entry, layout: QuantizedLayout) -> Iterator[Entry]:
    """Yield what a quantized checkpoint holds in the place of one tensor."""
    module, _, kind = entry.official.rpartition(".")
    if kind != "weight" or not layout.holds(module):
        yield entry
        return
    layout = layout.of_layer(module)
    if layout.bits == 4 and entry.shape[1] % 2:
        raise CheckpointError(
            f"config.json asks for codes of 4 bits, but {module} has {entry.shape[1]} input columns, and 4 "
            "bits need an even number: a byte holds two. Use the config.json written with the weights."
        )
    for name, shape in layout.shapes(entry.shape).items():
        native = tuple(f"{weight.removesuffix('weight')}{name}" for weight in entry.native)
        yield Entry(f"{module}.{name}", native, shape, entry.is_copy, is_codes=name == "weight")


def _first_generation(config: ChatGlmConfig) -> tuple[Entry, ...]:
    """The same names on both sides; the tied head is stored beside the embedding."""
    hidden, vocab, inner = config.hidden_size, config.vocab_size, config.intermediate_size
    # The fused projection stays whole here: `ChatGlmForCausalLM` has it, transformers' GLM has three.
    norm: dict[str, tuple[int, ...]] = {"weight": (hidden,), "bias": (hidden,)}
    layer = {
        "input_layernorm": norm,
        "attention.query_key_value": {"weight": (3 * hidden, hidden), "bias": (3 * hidden,)},
        "attention.dense": {"weight": (hidden, hidden), "bias": (hidden,)},
        "post_attention_layernorm": norm,
        "mlp.dense_h_to_4h": {"weight": (inner, hidden), "bias": (inner,)},
        "mlp.dense_4h_to_h": {"weight": (hidden, inner), "bias": (hidden,)},
    }
    shapes = {"transformer.word_embeddings.weight": (vocab, hidden)}
    for index in range(config.num_hidden_layers):
        for module, parameters in layer.items():
            shapes |= {f"transformer.layers.{index}.{module}.{kind}": s for kind, s in parameters.items()}
    shapes |= {f"transformer.final_layernorm.{kind}": shape for kind, shape in norm.items()}
    entries = [Entry(name, (name,), shape) for name, shape in shapes.items()]
    return (*entries, Entry("lm_head.weight", ("lm_head.weight",), (vocab, hidden), is_copy=True))


def _in_transformers_format(config: GlmConfig | Glm4Config) -> tuple[Entry, ...]:
    """The model's own names, in the order of the official ones: fingerprints of either format are equal."""
    hidden, vocab, inner = config.hidden_size, config.vocab_size, config.intermediate_size
    rows = dict(zip("qkv", FusedLayout.of(config).rows, strict=True))
    shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, rows["q"]),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    extra = ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
    shapes |= dict.fromkeys(extra, (hidden,)) if config.model_type == "glm4" else {}
    biases = ("weight", "bias") if config.attention_bias else ("weight",)
    attention = {
        f"self_attn.{part}_proj.{kind}": (rows[part], hidden) if kind == "weight" else (rows[part],)
        for kind in biases
        for part in "qkv"
    }
    named: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(config.num_hidden_layers):
        named += [(f"{NATIVE_LAYER}.{layer}.{name}", shape) for name, shape in (attention | shapes).items()]
    named.append(("model.norm.weight", (hidden,)))
    entries = [Entry(name, (name,), shape) for name, shape in named]
    head = Entry("lm_head.weight", ("lm_head.weight",), (vocab, hidden), is_copy=config.tie_word_embeddings)
    return (*entries, head)


def _later_generations(config: GlmConfig | Glm4Config) -> tuple[Entry, ...]:
    hidden, vocab, inner = config.hidden_size, config.vocab_size, config.intermediate_size
    layout = FusedLayout.of(config)
    fused = sum(layout.rows)
    shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attention.dense.weight": (hidden, layout.rows[0]),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.dense_h_to_4h.weight": (2 * inner, hidden),  # gate above up, in both
        "mlp.dense_4h_to_h.weight": (hidden, inner),
    }
    embedding, norm, head = OUTER
    entries = [Entry(embedding, (OUTER[embedding],), (vocab, hidden))]
    for layer in range(config.num_hidden_layers):
        kinds = ("weight", "bias") if config.attention_bias else ("weight",)
        for kind in kinds:
            native = tuple(f"{NATIVE_LAYER}.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
            shape = (fused, hidden) if kind == "weight" else (fused,)
            entries.append(
                Entry(f"{OFFICIAL_LAYER}.{layer}.self_attention.query_key_value.{kind}", native, shape)
            )
        for official, name in LAYER.items():
            entries.append(
                Entry(
                    f"{OFFICIAL_LAYER}.{layer}.{official}",
                    (f"{NATIVE_LAYER}.{layer}.{name}",),
                    shapes[official],
                )
            )
    entries.append(Entry(norm, (OUTER[norm],), (hidden,)))
    entries.append(Entry(head, (OUTER[head],), (vocab, hidden)))
    return tuple(entries)


def is_derived(official: str) -> bool:
    """Say whether a checkpoint tensor is a rotary table, which every model forms for itself.

    >>> is_derived("transformer.rotary_pos_emb.inv_freq"), is_derived("transformer.output_layer.weight")
    (True, False)
    """
    return official.endswith("inv_freq") and "rotary" in official


def split_fused(fused: Tensor, layout: FusedLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a fused projection into query, key and value.

    Args:
        fused: ``[(N + 2K) * D, ...]``, a weight, bias or gradient of any dtype.
        layout: order of its rows.

    Returns:
        ``[N * D, ...]``, ``[K * D, ...]`` and ``[K * D, ...]``; views where the rows are contiguous.
    """
    if not layout.per_head:
        query, key, value = fused.split(layout.rows)
        return query, key, value
    rest = fused.shape[1:]  # [3 * N * D, ...] seen as [N, 3, D, ...]: no views, the heads have to be gathered
    parts = fused.reshape(layout.num_heads, 3, layout.head_dim, *rest).unbind(1)
    query, key, value = (part.reshape(layout.num_heads * layout.head_dim, *rest) for part in parts)
    return query, key, value


def fuse(query: Tensor, key: Tensor, value: Tensor, layout: FusedLayout) -> Tensor:
    """Join query, key and value into the official projection; the inverse of `split_fused`.

    Args:
        query: ``[N * D, ...]``.
        key: ``[K * D, ...]``.
        value: ``[K * D, ...]``.
        layout: order of the rows to make.

    Returns:
        A new tensor ``[(N + 2K) * D, ...]``.
    """
    if not layout.per_head:
        return torch.cat((query, key, value))
    rest = query.shape[1:]
    parts = [part.reshape(layout.num_heads, layout.head_dim, *rest) for part in (query, key, value)]
    return torch.stack(parts, dim=1).reshape(-1, *rest)


def state_to_native(official: Mapping[str, Tensor], config: NativeConfig) -> dict[str, Tensor]:
    """Rename and cut a whole official state dictionary (weights or gradients); rotary tables are left out.

    Args:
        official: official name → tensor; need not be complete.
        config: as made by `native_config`.

    Returns:
        Native name → tensor, views where possible.

    Raises:
        CheckpointError: names that the table does not have.
    """
    table, layout = {entry.official: entry for entry in name_table(config)}, FusedLayout.of(config)
    leftover = sorted(name for name in official if name not in table and not is_derived(name))
    if leftover:
        raise CheckpointError(f"These tensors are not part of the model: {', '.join(leftover)}.")
    native: dict[str, Tensor] = {}
    for name, tensor in official.items():
        if name in table:
            targets = table[name].native
            native |= zip(
                targets, (tensor,) if len(targets) == 1 else split_fused(tensor, layout), strict=True
            )
    return native


def official_tensor(entry: Entry, native: Mapping[str, Tensor], layout: FusedLayout) -> Tensor:
    """Build one official tensor from a native state dictionary.

    Args:
        entry: which one.
        native: native name → tensor.
        layout: order of the fused rows.

    Returns:
        The tensor itself, or a new one where query, key and value are joined.
    """
    if len(entry.native) == 1:
        return native[entry.native[0]]
    query, key, value = (native[name] for name in entry.native)
    return fuse(query, key, value, layout)


def listed(names: list[str], limit: int = 12) -> str:
    """Word names for an error message; a checkpoint of another model would miss hundreds.

    >>> listed(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
