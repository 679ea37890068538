"""Attention over parts of a row's context, merged: so that what rows share is read from memory once.

With ``lse`` the log-sum-exp of the scores of a part, softmax over both parts is the mean of the parts' own
softmaxes with weights ``exp(lse_1 - lse)`` and ``exp(lse_2 - lse)``, ``lse`` that of both: exact, not an
approximation. So the queries of all rows meet the shared keys in one matrix product, and the shared keys
are read from memory once per step instead of once per row: decoding is bound by reading memory.

Shapes: B rows, N query heads, K key/value heads, Q new tokens, G = N / K * Q queries per key head,
C columns, P shared tokens, H head width.

Source:
    Juravsky et al. 2024, arXiv:2402.05099, section 3.1 (decomposed attention) and 3.2 (its batching).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.prompt_groups import SharedPrompt


@dataclass(frozen=True, slots=True)
class Segment:
    """A shared prompt and the places whose rows begin with it; None: all of them (nothing to pick out)."""

    shared: SharedPrompt
    places: Tensor | None

    def to(self, device: torch.device) -> Segment:
        """Return the same for layers on a device, on which the shared keys and values lie already."""
        return Segment(self.shared, None if self.places is None else self.places.to(device))


@dataclass(frozen=True, slots=True)
class PartialAttention:
    """Attention over some of the keys, in float32.

    Attributes:
        mixed: values weighted by the softmax over these keys, ``[B, K, G, H]``.
        lse: natural log of the sum of the exponentiated scores, ``[B, K, G, 1]``.
    """

    mixed: Tensor
    lse: Tensor

    def merge(self, other: PartialAttention) -> PartialAttention:
        """Return the attention over the keys of both (see the module)."""
        lse = torch.logaddexp(self.lse, other.lse)
        mixed = self.mixed * (self.lse - lse).exp() + other.mixed * (other.lse - lse).exp()
        return PartialAttention(mixed, lse)


def attend_part(
    query_BKGH: Tensor, keys_BKCH: Tensor, values_BKCH: Tensor, scaling: float, mask: Tensor | None = None
) -> PartialAttention:
    """Attend to some keys and values; ``mask`` is added to the scores ``[B, K, G, C]``."""
    scores = (query_BKGH @ keys_BKCH.transpose(2, 3)).float() * scaling
    if mask is not None:
        scores = scores + mask
    # Written out, as PyTorch's fused attention does not return the log-sum-exp.
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return PartialAttention(((scores - lse).exp().to(values_BKCH.dtype) @ values_BKCH).float(), lse)


def attend_shared(query_BKGH: Tensor, shared: KeysValues, scaling: float) -> PartialAttention:
    """Attend to keys and values ``[1, K, P, H]`` that all rows share: one matrix product per head.

    The queries of all rows stand in one matrix, as if they were B * G queries of a single row.
    """
    size, groups = query_BKGH.shape[0], query_BKGH.shape[2]
    query_1KQH = query_BKGH.transpose(0, 1).flatten(1, 2)[None]
    part = attend_part(query_1KQH, shared[0].to(query_BKGH), shared[1].to(query_BKGH), scaling)
    unpacked = [tensor[0].unflatten(1, (size, groups)).transpose(0, 1) for tensor in (part.mixed, part.lse)]
    return PartialAttention(*unpacked)


def merge_segment(
    part: PartialAttention, query_BKGH: Tensor, segment: Segment, layer: int, scaling: float
) -> PartialAttention:
    """Add what the rows of a segment see in its shared prompt; ``part`` may be overwritten."""
    states, places = segment.shared.layers[layer], segment.places
    if places is None:
        return part.merge(attend_shared(query_BKGH, states, scaling))
    mine = PartialAttention(part.mixed[places], part.lse[places])
    merged = mine.merge(attend_shared(query_BKGH[places], states, scaling))
    part.mixed[places], part.lse[places] = merged.mixed, merged.lse
    return part
