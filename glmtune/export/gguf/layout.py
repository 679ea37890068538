"""Names, order and shapes of a GGUF file's tensors, and which of our tensors each is made of.

::

    chatglm (ChatGLM2, ChatGLM3, GLM-4, GLM-Edge)      glm4 (GLM-4-0414, GLM-Z1-0414)
    attn_qkv: queries above keys above values          attn_q, attn_k, attn_v
                                                       two norms more: post_attention_norm, post_ffw_norm
    ffn_up: gate above up, as in the model itself      the same

Source:
    ``src/models/chatglm.cpp`` and ``glm4.cpp`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import Glm4Config, GlmConfig

from glmtune.models.checkpoints.shard_writer import LazyTensors

NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
EXTRA_NORMS = {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"}
MATRICES = {
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: in the file.
        sources: native names; more than one are joined row after row.
    """

    name: str
    sources: tuple[str, ...]


def tensor_table(config: GlmConfig | Glm4Config) -> tuple[Entry, ...]:
    """List the tensors of a file in the order of the forward pass.

    Args:
        config: as made by `native_config`.
    """
    table = [Entry("token_embd.weight", ("model.embed_tokens.weight",))]
    is_glm4 = config.model_type == "glm4"
    kinds = ("weight", "bias") if config.attention_bias else ("weight",)
    norms = NORMS | (EXTRA_NORMS if is_glm4 else {})
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for kind in kinds:
            parts = {part: f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv"}
            if is_glm4:
                table += [Entry(f"{theirs}.attn_{part}.{kind}", (name,)) for part, name in parts.items()]
            else:
                table.append(Entry(f"{theirs}.attn_qkv.{kind}", tuple(parts.values())))
        table += [
            Entry(f"{theirs}.{name}.weight", (f"{ours}.{native}.weight",))
            for name, native in (norms | MATRICES).items()
        ]
    table.append(Entry("output_norm.weight", ("model.norm.weight",)))
    if not config.tie_word_embeddings:  # a tied head is not stored: llama.cpp then takes the embedding
        table.append(Entry("output.weight", ("lm_head.weight",)))
    return tuple(table)


def file_tensors(weights: LazyTensors, config: GlmConfig | Glm4Config) -> LazyTensors:
    """Offer the tensors of a file, made of native ones.

    Args:
        weights: native name → tensor.
        config: as made by `native_config`.
    """
    table = tensor_table(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in table:
        parts = [weights.shapes[name] for name in entry.sources]
        shapes[entry.name] = (sum(part[0] for part in parts), *parts[0][1:])
    return LazyTensors({entry.name: partial(_joined, weights, entry.sources) for entry in table}, shapes)


def native_names(
    stored: LazyTensors, config: GlmConfig | Glm4Config, shapes: Mapping[str, tuple[int, ...]]
) -> LazyTensors:
    """Offer native tensors, cut out of those of a file: the inverse of `file_tensors`.

    Args:
        stored: name in the file → tensor.
        config: of the model.
        shapes: native name → shape.
    """
    makers, found = {}, {}
    for entry in tensor_table(config):
        start = 0
        for name in entry.sources:
            rows = shapes[name][0]
            makers[name] = partial(_rows, stored, entry.name, start, start + rows)
            found[name] = shapes[name]
            start += rows
    if config.tie_word_embeddings:
        makers["lm_head.weight"] = makers["model.embed_tokens.weight"]
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return LazyTensors(makers, found)


def _joined(weights: LazyTensors, names: tuple[str, ...]) -> Tensor:
    parts = [weights[name] for name in names]
    if len(parts) == 1:
        return parts[0]
    kind = parts[0].dtype
    for part in parts[1:]:
        kind = torch.promote_types(kind, part.dtype)  # an adapted projection is float32, others as stored
    return torch.cat([part.to(kind) for part in parts])


def _rows(stored: LazyTensors, name: str, start: int, stop: int) -> Tensor:
    return stored[name][start:stop]
