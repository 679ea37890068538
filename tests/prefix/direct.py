"""A GLM with a prefix written straight from the facts, sharing no attention or mask code with the library."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import GlmForCausalLM


def _norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(heads: Tensor, positions: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of the first half of each head; heads are [tokens, heads, size]."""
    size = heads.shape[-1]
    rotary = size // 2
    frequencies = 10000 ** (-torch.arange(0, rotary, 2) / rotary)
    angles = positions[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    cos, sin = cos.to(heads), sin.to(heads)
    even, odd = heads[..., 0:rotary:2], heads[..., 1:rotary:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, heads[..., rotary:]], dim=-1)


@torch.no_grad()
def direct_logits(
    model: GlmForCausalLM, ids: Tensor, prefix: Tensor | None, gates: Tensor | None = None
) -> Tensor:
    """Compute the logits [tokens, vocab] of one sequence, token by token and head by head.

    Args:
        model: only its weights and config are read.
        ids: int64 [tokens], positions 0, 1, 2, ...
        prefix: [layers, 2, length, kv heads, size], or None.
        gates: [layers, heads], between -1 and 1: the prefix has a softmax of its own; or None.
    """
    weights, config = dict(model.state_dict()), model.config
    size, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    positions = torch.arange(len(ids), dtype=torch.float32)
    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        w = {n.split(f"layers.{layer}.")[1]: t for n, t in weights.items() if f"layers.{layer}." in n}
        normed = _norm(hidden, w["input_layernorm.weight"], config.rms_norm_eps)

        def project(name: str, w: dict[str, Tensor] = w, normed: Tensor = normed) -> Tensor:
            flat = linear(normed, w[f"self_attn.{name}_proj.weight"], w[f"self_attn.{name}_proj.bias"])
            return flat.view(len(ids), -1, size)

        query, key, value = _rotate(project("q"), positions), _rotate(project("k"), positions), project("v")
        mixed = hidden.new_zeros(len(ids), heads, size)
        for token in range(len(ids)):
            for head in range(heads):
                group = head // (heads // groups)
                keys, values = key[: token + 1, group], value[: token + 1, group]
                if prefix is not None and gates is None:
                    keys = torch.cat([prefix[layer, 0, :, group], keys])
                    values = torch.cat([prefix[layer, 1, :, group], values])
                shares = torch.softmax(keys @ query[token, head] / math.sqrt(size), dim=0)
                mixed[token, head] = shares @ values
                if prefix is not None and gates is not None:
                    scores = prefix[layer, 0, :, group] @ query[token, head] / math.sqrt(size)
                    added = torch.softmax(scores, dim=0) @ prefix[layer, 1, :, group]
                    mixed[token, head] += gates[layer, head] * added
        hidden = hidden + mixed.flatten(1) @ w["self_attn.o_proj.weight"].T
        normed = _norm(hidden, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = (normed @ w["mlp.gate_up_proj.weight"].T).chunk(2, dim=-1)
        hidden = hidden + (silu(gate) * up) @ w["mlp.down_proj.weight"].T
    final = _norm(hidden, weights["model.norm.weight"], config.rms_norm_eps)
    return final @ weights["lm_head.weight"].T
