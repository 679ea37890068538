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

A prefix has a strength s: its columns weigh s times what they would, by log s added to their scores. 1 is the
prefix as it was trained, 0 the bare base (the prefix is left out), what lies between is a mixture of the two.

A gated prefix is not put in front: tokens are attended to as without it, and it is added (see
`glmtune.prefix.gate`).

Shapes: B batch, N query heads, K key/value heads, Q query length, S key length (with cache), P prefix length,
H head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.glm.modeling_glm import eager_attention_forward

from glmtune.models.architectures.grouped_attention import grouped_sdpa
from glmtune.prefix.encoder import LayerStates
from glmtune.prefix.gate import add_gated

WITH_PREFIX = {"sdpa": "glmtune_sdpa", "eager": "glmtune_eager"}
"""Stock attention implementation -> ours; what is not listed cannot carry a prefix."""
STRENGTH_WIDTH = 8
"""Channels that `weaken` adds: fused kernels want head widths that are multiples of 8."""
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


def weaken(
    query: Tensor, key: Tensor, value: Tensor, *, num_prefix: int, strength: float, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Let the first key columns count ``strength`` times: add log strength to their scores.

    Not by a mask, which would have to be written out, queries times keys, where a prompt is causal without
    one. Two more channels do it: 1 in every query, and in the prefix's keys what gives log strength after
    scaling (as a rounded number and its remainder, so that half precision costs nothing). The other channels
    added are zero, those of the values too.

    Args:
        query: ``[B, N, Q, H]``.
        key: ``[B, K, P + S, H]``, the prefix in front.
        value: ``[B, K, P + S, H]``.
        num_prefix: P.
        strength: above 0.
        scaling: what attention multiplies scores by.

    Returns:
        Query, key and value of width ``H + STRENGTH_WIDTH``; the attention's last `STRENGTH_WIDTH` channels
        are to be dropped.
    """
    width = query.shape[3]
    query, key, value = (nn.functional.pad(part, (0, STRENGTH_WIDTH)) for part in (query, key, value))
    query[..., width : width + 2] = 1
    added = torch.tensor(math.log(strength) / scaling, dtype=torch.float32)
    rounded = added.to(key.dtype)
    key[:, :, :num_prefix, width] = rounded.item()
    key[:, :, :num_prefix, width + 1] = (added - rounded.float()).item()
    return query, key, value


def sdpa_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_key_values: LayerStates | None = None,
    prefix_gates: Sequence[Tensor] | None = None,
    prefix_strength: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run PyTorch's fused attention over prefix and tokens; arguments as in the attention interface.

    A mask of None with many queries means causal, unless ``is_causal`` is False, and then none is made: P
    blank queries in front of the others line the queries up with the keys, so that the kernel's own causal
    rule shows every token the whole prefix and the tokens up to itself. Memory stays linear in S.
    """
    if prefix_key_values is None:
        return grouped_sdpa(module, query, key, value, attention_mask, **kwargs)
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    if prefix_gates is not None:
        mixed_BQNH, _ = grouped_sdpa(module, query, key, value, attention_mask, **kwargs)
        dropout: float = kwargs.get("dropout", 0.0)
        states, gate = prefix_key_values[layer], prefix_gates[layer]
        return add_gated(mixed_BQNH, query, states, gate, scaling=kwargs["scaling"], dropout=dropout), None
    num_queries = query.shape[2]
    is_causal = attention_mask is None and num_queries > 1 and kwargs.get("is_causal") is not False
    if is_causal:  # a static cache hands out room for later tokens as well
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    key, value, attention_mask = prepend(layer, key, value, attention_mask, prefix_key_values)
    if is_causal:  # (P + S) x (P + S), and the answers to the P blank queries are dropped below
        query = nn.functional.pad(query, (0, 0, key.shape[2] - num_queries, 0))
    kwargs["is_causal"] = is_causal
    width = query.shape[3]
    if prefix_strength != 1:
        scaling, num_prefix = kwargs["scaling"], prefix_key_values[layer][0].shape[2]
        query, key, value = weaken(
            query, key, value, num_prefix=num_prefix, strength=prefix_strength, scaling=scaling
        )
    mixed_BQNH, _ = grouped_sdpa(module, query, key, value, attention_mask, **kwargs)
    return mixed_BQNH[:, -num_queries:, :, :width], None


def eager_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_key_values: LayerStates | None = None,
    prefix_gates: Sequence[Tensor] | None = None,
    prefix_strength: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Run step-by-step attention over prefix and tokens.

    The weights ``[B, N, Q, P + S]`` show both; those of a gated prefix are times its gate.
    """
    width = query.shape[3]
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    if prefix_key_values is not None and prefix_gates is not None:
        mixed_BQNH, weights_BNQS = eager_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        key, value = (part.to(query) for part in prefix_key_values[layer])
        gate_N1 = prefix_gates[layer].to(query)[:, None]
        added_BQNH, weights_BNQP = eager_attention_forward(module, query, key, value, None, **kwargs)
        weights_BNQP = gate_N1[:, None] * weights_BNQP
        return mixed_BQNH + gate_N1 * added_BQNH, torch.cat([weights_BNQP, weights_BNQS], dim=3)
    if prefix_key_values is not None:
        key, value, attention_mask = prepend(layer, key, value, attention_mask, prefix_key_values)
        if prefix_strength != 1:
            scaling, num_prefix = kwargs["scaling"], prefix_key_values[layer][0].shape[2]
            query, key, value = weaken(
                query, key, value, num_prefix=num_prefix, strength=prefix_strength, scaling=scaling
            )
    mixed_BQNH, weights_BNQS = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return mixed_BQNH[..., :width], weights_BNQS


def _rows_apart(attend: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Any]:
    """Let an attention with a prefix take ``tuned_rows``, bool ``[B]``: the other rows do not see the prefix.

    Each kind of rows is attended to by itself, so that both compute just what they do alone, and no mask over
    queries times keys is made for hiding a few columns.
    """

    @functools.wraps(attend)
    def attend_apart(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        tuned_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        states = kwargs.pop("prefix_key_values", None)
        if tuned_rows is None or states is None:
            return attend(module, query, key, value, attention_mask, prefix_key_values=states, **kwargs)
        layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
        mixed: list[Tensor] = []
        weights: list[Tensor | None] = []
        places = [tuned_rows.nonzero()[:, 0].to(query.device), (~tuned_rows).nonzero()[:, 0].to(query.device)]
        for rows, hidden in zip(places, (False, True), strict=True):
            if not len(rows):
                continue
            mask = attention_mask
            if mask is not None and len(mask) == len(query):
                mask = mask[rows]
            own = None if hidden else {layer: tuple(part[: len(rows)] for part in states[layer])}
            parts = (query[rows], key[rows], value[rows])
            found, seen = attend(module, *parts, mask, prefix_key_values=own, **kwargs)
            if hidden and seen is not None:  # weights of columns that these rows do not see
                seen = nn.functional.pad(seen, (states[layer][0].shape[2], 0))
            mixed.append(found)
            weights.append(seen)
        order = torch.cat(places).argsort()
        shown = [each for each in weights if each is not None]
        return torch.cat(mixed)[order], torch.cat(shown)[order] if shown else None

    return attend_apart


def register_attention() -> None:
    """Make the names of `WITH_PREFIX` known to transformers; doing it again changes nothing.

    Masks too: for a name without a mask function transformers forms no mask at all.
    """
    AttentionInterface.register("glmtune_sdpa", _rows_apart(sdpa_with_prefix))
    AttentionInterface.register("glmtune_eager", _rows_apart(eager_with_prefix))
    AttentionMaskInterface.register("glmtune_sdpa", sdpa_mask)
    AttentionMaskInterface.register("glmtune_eager", eager_mask)
