"""First weights that can copy: an induction head set by hand in the first two layers of glm-tiny.

Copying from the prompt is what a small model spends most of its training on, the more characters there are to
copy (see docs/log.md). Here it is there from the first step, and training goes on from it:

- layer 0: every group's first head looks one token back (its query and key are constants, so that distance
  alone counts) and writes that token's embedding, seen through one half R of an orthogonal basis, into the
  other half M;
- layer 1: the same heads look for a place whose previous token (read from M) is the current one (read from
  R), and write what stands there, times ``STRENGTH``;
- all other heads and MLPs begin by writing nothing.

Head and embedding must be one matrix with rows of length about 1: then a written embedding is a prediction.

Source:
    Olsson et al. 2022, arXiv:2209.11895 (what an induction head is); the weights are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GlmConfig, GlmForCausalLM

# With these four numbers 92 % of the characters of repeated random strings are right before the first step
# (docs/log.md).
LOOK_BACK = (17.0, 12.0, 8.0, 6.0)
"""Logits that the four fastest rotary frequencies add for the token one place back. One frequency alone has
the same maximum a whole turn further back; of several with falling weights only the true place adds up."""
PREVIOUS = 3.0
"""How much longer the previous token is written than the token's own embedding: it must stay legible in the
norm of layer 1 beside what else the stream holds."""
MATCH = 25.0
"""Logit of a place whose previous token is the current one: enough to outweigh a thousand other places."""
STRENGTH = 5.0
"""How much longer the predicted token is written than an embedding, so that it outweighs the token itself."""


@dataclass(frozen=True)
class _Heads:
    """The first query head of every group, and the basis they share.

    Attributes:
        size: head width H.
        rotary: rotated channels of a head; they come first, in pairs.
        starts: per group, where its query head and its key/value head begin.
        read: R, float ``[groups * H, hidden]``, orthonormal rows.
        write: M, the same shape, orthogonal to R.
    """

    size: int
    rotary: int
    starts: tuple[tuple[int, int], ...]
    read: Tensor
    write: Tensor

    def rows(self, basis: Tensor, key_start: int) -> Tensor:
        """Return the rows ``[H, hidden]`` of a basis that belong to a group."""
        return basis[key_start : key_start + self.size]


def teach_copying(model: GlmForCausalLM, *, seed: int = 0) -> None:
    """Set the first two layers of a fresh model so that it copies; all later ones start silent.

    Args:
        model: of a shape that `can_copy`; mutated.
        seed: of the orthogonal basis.
    """
    config = model.config
    assert can_copy(config), (
        "copying needs two layers, eight rotary channels and room for two halves of a basis"
    )
    heads = _heads(config, seed)
    layers = [cast(Any, layer) for layer in model.model.layers]
    for layer in layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    with torch.no_grad():
        _look_back(layers[0].self_attn, heads)
        _look_for_match(layers[1].self_attn, heads)


def teach_copying_where_it_fits(model: nn.Module) -> None:
    """Let a fresh model copy, if it has the shape for it; any other model stays as it is.

    Args:
        model: mutated.
    """
    if isinstance(model, GlmForCausalLM) and can_copy(model.config):
        teach_copying(model)


def can_copy(config: GlmConfig) -> bool:
    """Say whether a model has the shape that `teach_copying` needs."""
    size, groups = cast(int, config.head_dim), cast(int, config.num_key_value_heads)
    return (
        config.num_hidden_layers >= 2
        and bool(config.attention_bias)
        and size >= 16
        and 2 * groups * size <= config.hidden_size
    )


def _heads(config: GlmConfig, seed: int) -> _Heads:
    size, groups = cast(int, config.head_dim), cast(int, config.num_key_value_heads)
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(config.hidden_size, config.hidden_size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q.float()
    width = groups * size
    step = config.num_attention_heads // groups * size
    return _Heads(
        size=size,
        rotary=size // 2,
        starts=tuple((group * step, group * size) for group in range(groups)),
        read=basis[:width],
        write=basis[width : 2 * width],
    )


def _look_back(attention: nn.Module, heads: _Heads) -> None:
    """Score a place by its distance alone, highest one place back; write the token there into M."""
    # A constant query and a constant key that is turned by one position: rotated, their product depends on
    # the distance alone, as sum(logit * cos(frequency * (distance - 1))), which is largest at distance 1.
    frequencies = [10_000 ** (-2 * pair / heads.rotary) for pair in range(len(LOOK_BACK))]
    amplitudes = [math.sqrt(logit * math.sqrt(heads.size)) for logit in LOOK_BACK]
    root = math.sqrt(heads.read.shape[1])
    query, key, value, out = (getattr(attention, f"{name}_proj") for name in "qkvo")
    for at, key_at in heads.starts:
        for projection, start in ((query, at), (key, key_at)):
            projection.weight[start : start + heads.size] = 0
            projection.bias[start : start + heads.size] = 0
        for pair, (frequency, amplitude) in enumerate(zip(frequencies, amplitudes, strict=True)):
            query.bias[at + 2 * pair] = amplitude
            key.bias[key_at + 2 * pair] = amplitude * math.cos(frequency)
            key.bias[key_at + 2 * pair + 1] = amplitude * math.sin(frequency)
        value.weight[key_at : key_at + heads.size] = heads.rows(heads.read, key_at) / root
        out.weight[:, at : at + heads.size] = PREVIOUS * heads.rows(heads.write, key_at).T


def _look_for_match(attention: nn.Module, heads: _Heads) -> None:
    """Score a place by how alike its previous token and the current one are; write what stands there."""
    # The norm in front divides by the stream's size, embedding plus what layer 0 wrote; `scale` undoes it, so
    # that a match has the logit MATCH whatever the sizes of the model are.
    width, hidden = heads.read.shape
    # Of the normalised input over the embedding.
    scale = math.sqrt(hidden / (1 + PREVIOUS**2 * width / hidden))
    channels = slice(heads.rotary // 2, heads.size)  # those that rotation leaves (almost) alone
    num_channels = heads.size - heads.rotary // 2
    amplitude = math.sqrt(MATCH * math.sqrt(heads.size) * hidden / (scale**2 * num_channels * PREVIOUS))
    query, key, value, out = (getattr(attention, f"{name}_proj") for name in "qkvo")
    for at, key_at in heads.starts:
        read, write = heads.rows(heads.read, key_at), heads.rows(heads.write, key_at)
        query.weight[at : at + heads.size] = 0
        key.weight[key_at : key_at + heads.size] = 0
        query.weight[at : at + heads.size][channels] = amplitude * read[channels]
        key.weight[key_at : key_at + heads.size][channels] = amplitude * write[channels]
        value.weight[key_at : key_at + heads.size] = read / scale
        out.weight[:, at : at + heads.size] = STRENGTH * read.T
