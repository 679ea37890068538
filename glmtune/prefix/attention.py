"""Attention and mask functions that put a prefix in front of a layer's keys and values.

They wrap the stock functions of transformers and are chosen by name through its attention interface, so the
models themselves stay as they are.

The prefix is put in front here, behind the cache and the rotation, and not into the cache as the releases do:

- Its keys are not rotated, which is the same as standing at position 0, and tokens count from 0 with and
without
  a prefix. (So it is in the releases: ``past_key_values``, through which the prefix comes, holds keys that
  are rotated already.)
- A cache holds tokens alone: it can be cropped, shared between prompts and counted in tokens, and gradient
  checkpointing, which allows no cache, still has the prefix.

Shapes: B batch, N query heads, K key/value heads, Q query length, S key length (with cache), P prefix length,
H head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.glm.modeling_glm import eager_attention_forward

from glmtune.models.architectures.grouped_attention import grouped_sdpa
from glmtune.prefix.encoder import LayerStates

WITH_PREFIX = {"sdpa": "glmtune_sdpa", "eager": "glmtune_eager"}
"""Stock attention implementation -> ours; what is not listed cannot carry a prefix."""
CARRYING = (*WITH_PREFIX.values(), "glmtune_engine")
"""Implementations that see a prefix; the last is the evaluation engine's, in use during its forwards only."""


def prepend(
    layer: int, key: Tensor, value: Tensor, attention_mask: Tensor | None, states: LayerStates
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put a layer's prefix in front of its keys and values and let every query see it.

    Args:
        layer: index of the layer.
        key: ``[B, K, S, H]``, rotated.
        value: ``[B, K, S, H]``.
        attention_mask: ``[B, 1 or N, Q, S]``, boolean (True = visible) or additive; None = all visible.
        states: the prefix of all layers, un-rotated, each ``[B, K, P, H]``.

    Returns:
        Key and value ``[B, K, P + S, H]`` and the mask ``[B, 1 or N, Q, P + S]`` (None stays None).
    """
    prefix_key, prefix_value = states[layer]
    # `.to(key)`, for both: under autocast keys and values may differ in type from the prefix, and layers may
    # sit on different devices. The mask grows in front, where the prefix stands, and hides none of it.
    key = torch.cat([prefix_key.to(key), key], dim=2)
    value = torch.cat([prefix_value.to(value), value], dim=2)
    if attention_mask is not None:
        visible = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = nn.functional.pad(attention_mask, (prefix_key.shape[2], 0), value=visible)
    return key, value, attention_mask


def sdpa_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_key_values: LayerStates | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run PyTorch's fused attention over prefix and tokens; arguments as in the attention interface.

    A mask of None with many queries means causal, unless ``is_causal`` is False, and then none is made: P
    blank queries in front of the others line the queries up with the keys, so that the kernel's own causal
    rule shows every token the whole prefix and the tokens up to itself. Memory stays linear in S.
    """
    if prefix_key_values is None:
        return grouped_sdpa(module, query, key, value, attention_mask, **kwargs)
    num_queries = query.shape[2]
    is_causal = attention_mask is None and num_queries > 1 and kwargs.get("is_causal") is not False
    if is_causal:  # a static cache hands out room for later tokens as well
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    key, value, attention_mask = prepend(layer, key, value, attention_mask, prefix_key_values)
    if is_causal:  # (P + S) x (P + S), and the answers to the P blank queries are dropped below
        query = nn.functional.pad(query, (0, 0, key.shape[2] - num_queries, 0))
    kwargs["is_causal"] = is_causal
    mixed_BQNH, _ = grouped_sdpa(module, query, key, value, attention_mask, **kwargs)
    return mixed_BQNH[:, -num_queries:], None


def eager_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_key_values: LayerStates | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Run step-by-step attention over prefix and tokens; the weights ``[B, N, Q, P + S]`` show both."""
    if prefix_key_values is not None:
        layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
        key, value, attention_mask = prepend(layer, key, value, attention_mask, prefix_key_values)
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


def register_attention() -> None:
    """Make the names of `WITH_PREFIX` known to transformers; doing it again changes nothing.

    Masks too: for a name without a mask function transformers forms no mask at all.
    """
    AttentionInterface.register("glmtune_sdpa", sdpa_with_prefix)
    AttentionInterface.register("glmtune_eager", eager_with_prefix)
    AttentionMaskInterface.register("glmtune_sdpa", sdpa_mask)
    AttentionMaskInterface.register("glmtune_eager", eager_mask)
