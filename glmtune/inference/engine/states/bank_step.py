"""One forward pass over the rows of a bank: where their new tokens go, what these see, and the attention.

Shapes: n rows of a bank, N query heads, K key/value heads, Q new tokens, G = N / K * Q queries per key head,
C columns, H head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.states.bank import Bank
from glmtune.inference.engine.states.decomposed import (
    PartialAttention,
    Segment,
    attend_part,
    attend_shared,
    merge_segment,
)


@dataclass(frozen=True, slots=True)
class BankStep:
    """What a bank does in the layers of a forward pass.

    Attributes:
        bank: with room for the new tokens.
        places: of its rows in the batch.
        num_columns: that are attended to, C.
        where: index of the new tokens' columns, over slots, heads and columns.
        mask: additive, ``[n, 1, G, C]``: the strength of prefixes, and -inf on what is not to be seen.
    """

    bank: Bank
    places: slice
    num_columns: int
    where: tuple[Tensor, slice, Tensor]
    mask: Tensor

    def to(self, device: torch.device) -> BankStep:
        """Return the same for layers on a device."""
        slots, heads, columns = self.where
        where = (slots.to(device), heads, columns.to(device))
        return dataclasses.replace(self, where=where, mask=self.mask.to(device))


@dataclass(frozen=True, slots=True)
class AttachedPrefix:
    """What an encoder that is attached to the model puts in front of all rows in a layer.

    Attributes:
        keys: ``[B, K, E, H]``, all rows alike.
        values: of the same shape.
        strength: above 0; see `glmtune.prefix.attention`.
    """

    keys: Tensor
    values: Tensor
    strength: float


def _read(step: BankStep, layer: int) -> KeysValues:
    keys, values = step.bank.layers[layer]
    size = step.places.stop - step.places.start
    return keys.read(size, step.num_columns), values.read(size, step.num_columns)


def attend_bank(
    step: BankStep, layer: int, query_BKGH: Tensor, scaling: float, *, num_tokens: int = 1
) -> Tensor:
    """Attend to a bank's own columns, ``[n, K, G, H]``.

    Args:
        step: of the bank.
        layer: index of the layer.
        query_BKGH: of all rows of the batch.
        scaling: factor of the scores.
        num_tokens: new tokens per row, Q.
    """
    keys, values = _read(step, layer)
    query_nKGH = query_BKGH[step.places]
    if num_tokens == 1 or query_nKGH.device.type != "cpu":
        return nn.functional.scaled_dot_product_attention(
            query_nKGH, keys, values, attn_mask=step.mask, scale=scaling
        )
    # On CPUs token by token, over the columns that there would be without those behind it: the very product
    # that a step with this token alone computes. Sums over more columns, or with more queries in a matrix,
    # come out otherwise in the last bit; this way a draft changes nothing (see docs/serving.md).
    mixed_nKgQH = torch.empty_like(query_nKGH).unflatten(2, (-1, num_tokens))
    each = (query_nKGH.unflatten(2, (-1, num_tokens)), step.mask.unflatten(2, (-1, num_tokens)))
    for token in range(num_tokens):
        query_nKgH, mask_n1gC = (whole[..., token, :].contiguous() for whole in each)
        seen = step.num_columns - (num_tokens - 1 - token)
        mixed_nKgQH[..., token, :] = nn.functional.scaled_dot_product_attention(
            query_nKgH, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask_n1gC[..., :seen], scale=scaling
        )
    return mixed_nKgQH.flatten(2, 3)


def attend_apart(
    steps: Sequence[BankStep],
    segments: Sequence[Segment],
    layer: int,
    query_BKGH: Tensor,
    prefix: AttachedPrefix | None,
    scaling: float,
) -> Tensor:
    """Attend to every row's own columns, an attached prefix and shared prompts, and merge."""
    parts = [attend_part(query_BKGH[step.places], *_read(step, layer), scaling, step.mask) for step in steps]
    part = PartialAttention(
        torch.cat([each.mixed for each in parts]), torch.cat([each.lse for each in parts])
    )
    if prefix is not None:  # attached to the model: the same for all rows
        seen = attend_shared(query_BKGH, (prefix.keys[:1], prefix.values[:1]), scaling)
        # log strength on every score is log strength on the log of the sum of their exponentials.
        part = part.merge(PartialAttention(seen.mixed, seen.lse + math.log(prefix.strength)))
    for segment in segments:
        part = merge_segment(part, query_BKGH, segment, layer, scaling)
    return part.mixed
