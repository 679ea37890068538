"""The attention of the engine: prompts behind a shared prompt, and one token per row of a batch.

A model in the engine runs with the attention implementation ``glmtune_engine``, which leaves everything to
the states object handed down with the forward pass. transformers' own cache is not used: it holds one
rectangle of keys and values for all rows, while here rows differ in length and share their first tokens.

Prompts are read in two passes, which give the same hidden states as one (a causal model's token depends
only on those before it)::

    pass 1   [shared prompt]                     once, one row      -> SharedPrompt
    pass 2   [shared prompt] question 1          all rows of a group; only the questions pass through
             [shared prompt] question 2 ..       the layers, the shared keys and values come from pass 1

Shapes: B rows, N query heads, K key/value heads, Q queries, S own tokens, P shared tokens, H head width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from glmtune.inference.engine.prompt_groups import SharedPrompt

ENGINE_ATTENTION = "glmtune_engine"

KeysValues = tuple[Tensor, Tensor]


class AttentionStates(Protocol):
    """What holds the keys and values of the rows of a forward pass."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        own: KeysValues,
        *,
        mask: Tensor | None,
        prefix: KeysValues | None,
        scaling: float,
    ) -> Tensor:
        """Attend in one layer.

        Args:
            layer: index of the layer.
            query: ``[B, N, Q, H]``, rotated.
            own: keys (rotated) and values of the same tokens, each ``[B, K, Q, H]``.
            mask: over own tokens, boolean (True = visible) or additive; None: causal.
            prefix: what an attached prefix encoder puts in front, each ``[B, K, E, H]``, visible to all.
            scaling: factor of the scores.

        Returns:
            ``[B, Q, N, H]``.
        """
        ...


class ReadStates:
    """Reads prompts behind a shared prompt, pass 1 and 2 alike (in pass 1 it is that of the parent, or none).

    Attributes:
        own: keys and values of the prompts' own tokens per layer, each ``[B, K, S, H]``, where kept.
    """

    def __init__(self, shared: SharedPrompt, *, keep: bool) -> None:
        """Start before the first layer; ``keep`` says whether to remember the tokens' keys and values."""
        self.own: list[KeysValues] = []
        self._shared, self._keep = shared, keep
        self._mask: Tensor | None = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        own: KeysValues,
        *,
        mask: Tensor | None,
        prefix: KeysValues | None,
        scaling: float,
    ) -> Tensor:
        """Attend to the prefix, the shared tokens and, causally, to the row's own; see `AttentionStates`."""
        if self._keep:
            self.own.append(own)
        before = [prefix] if prefix is not None else []
        before += self._shared.layers[layer : layer + 1]  # none where the shared prompt is empty
        # Joined for one call of the fused attention, which does not return the log-sum-exp that merging
        # separate parts needs (see slots.py); reading is bound by arithmetic, so the copies hardly count.
        parts = [
            (part[0].expand(len(query), -1, -1, -1), part[1].expand(len(query), -1, -1, -1))
            for part in before
        ]
        keys = torch.cat([*(part[0].to(own[0]) for part in parts), own[0]], dim=2)
        values = torch.cat([*(part[1].to(own[1]) for part in parts), own[1]], dim=2)
        num_before = keys.shape[2] - own[0].shape[2]
        if mask is not None:  # of ChatGLM-6B, whose prompt sees itself in both directions
            visible = True if mask.dtype == torch.bool else 0.0
            mask = nn.functional.pad(mask, (num_before, 0), value=visible)
        elif num_before:
            mask = self._causal(query, num_before)
        return _attend_grouped(query, keys, values, mask, scaling).transpose(1, 2)

    def _causal(self, query: Tensor, num_before: int) -> Tensor:
        """Show every query all tokens before the prompt and the prompt up to itself.

        PyTorch's ``is_causal`` cannot say that: with more keys than queries it aligns the first of both, as
        if the queries were the first tokens. One mask serves all layers.
        """
        size = query.shape[2]
        if self._mask is None or self._mask.shape[3] != num_before + size:
            everything = torch.ones(1, 1, size, num_before + size, dtype=torch.bool, device=query.device)
            self._mask = everything.tril(num_before)
        return self._mask


def _attend_grouped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Run PyTorch's fused attention, ``[B, N, Q, H]``; no mask means causal."""
    groups = query.shape[1] // keys.shape[1]
    # With a mask and fewer key heads than query heads, CUDA takes a kernel that is slower than a copy.
    has_native_groups = mask is None or query.device.type == "cpu"
    if groups > 1 and not has_native_groups:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    return nn.functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=groups > 1 and has_native_groups,
    )


def engine_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    engine_states: AttentionStates,
    scaling: float,
    prefix_key_values: Any = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Hand a layer's attention to the states of the forward pass.

    Called by transformers (5.x, `AttentionInterface`) once per layer in place of its attention functions;
    ``engine_states`` is the keyword given to the model's forward, which every layer passes on.
    """
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    prefix = None if prefix_key_values is None else prefix_key_values[layer]
    mixed_BQNH = engine_states.attend(
        layer, query, (key, value), mask=attention_mask, prefix=prefix, scaling=scaling
    )
    return mixed_BQNH, None


def register_engine_attention() -> None:
    """Make `ENGINE_ATTENTION` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(ENGINE_ATTENTION, engine_attention)
    AttentionMaskInterface.register(ENGINE_ATTENTION, sdpa_mask)
