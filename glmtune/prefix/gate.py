"""A gated prefix: a softmax of its own, added to attention over tokens, times a gate that opens from zero.

::

    without a gate   softmax over [prefix | tokens]              the prefix takes attention mass from tokens
    with a gate      softmax over [tokens] + g softmax over [prefix]             g = 0: exactly the base

g is the tanh of a trained number, one per layer and query head: between -1 and 1, and 0 in a new prefix. Its
gradient there is what attention over the prefix would add, so gates move first; keys and values get gradients
times g, so they follow. (Both at zero would be a point that training never leaves.)

A strength s multiplies g: 0 is the bare base, 1 the prefix as trained.

Shapes: B batch, N query heads, K key/value heads, G = N / K, Q query length, P prefix length, H head width.

Source:
    Zhang et al. 2023, LLaMA-Adapter, arXiv:2303.16199, section 3.2 (there in the upper layers alone, and in
    front of the tokens' own softmax; with tanh as in its released code).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def add_gated(
    mixed_BQNH: Tensor,
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    gate: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Add attention over a prefix, times a gate, to attention over tokens.

    Args:
        mixed_BQNH: attention over tokens, ``[B, Q, N, H]``.
        query: ``[B, N, Q, H]``, rotated; prefix keys are not, which is the same as standing at position 0.
        prefix: keys and values of the layer, each ``[B or 1, K, P, H]``; every query sees all of them.
        gate: float ``[N]``.
        scaling: factor of the scores.
        dropout: fraction of the weights dropped, as in the attention over tokens.

    Returns:
        ``[B, Q, N, H]``, of the type of ``mixed_BQNH``; bit-equal to it where the gate is 0.
    """
    batch, heads, num_queries, width = query.shape
    num_keys = prefix[0].shape[1]
    keys, values = (part.to(query).expand(batch, -1, -1, -1) for part in prefix)
    # All queries see all columns, so those of the heads of a group can stand in one matrix: no kernel has to
    # know of groups, and none repeats keys.
    grouped = query.reshape(batch, num_keys, -1, width)
    added = nn.functional.scaled_dot_product_attention(
        grouped, keys, values, dropout_p=dropout, scale=scaling
    )
    # In five dimensions, as kernels leave results in different orders: so none is copied to be added.
    added_BQKGH = added.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4)
    mixed_BQKGH = mixed_BQNH.unflatten(2, (num_keys, -1))
    gate_KG1 = gate.to(mixed_BQNH).view(num_keys, heads // num_keys, 1)
    return torch.addcmul(mixed_BQKGH, gate_KG1, added_BQKGH.to(mixed_BQNH)).flatten(2, 3)
