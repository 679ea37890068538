"""The attention of the engine: every layer hands its queries, keys and values to the states of the pass.

A model in the engine runs with the attention implementation ``glmtune_engine``, which leaves everything to
the states object handed down with the forward pass. transformers' own cache is not used: it holds one
rectangle of keys and values for all rows, while here rows differ in length, in what stands in front of them,
and may share their first tokens.

`reading.ReadStates` reads prompts, `states.BatchStates` goes on from them token by token.

Shapes: B rows, N query heads, K key/value heads, Q queries, E tokens of an attached prefix, H head width.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from glmtune.prefix.gate import add_gated

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
        prefix_strength: float = 1.0,
        scaling: float,
    ) -> Tensor:
        """Attend in one layer.

        Args:
            layer: index of the layer.
            query: ``[B, N, Q, H]``, rotated.
            own: keys (rotated) and values of the same tokens, each ``[B, K, Q, H]``.
            mask: over own tokens, boolean (True = visible) or additive; None: causal.
            prefix: what an attached prefix encoder puts in front, each ``[B, K, E, H]``, visible to all.
            prefix_strength: above 0; its log is added to the scores of that prefix's columns.
            scaling: factor of the scores.

        Returns:
            ``[B, Q, N, H]``.
        """
        ...


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
    prefix_gates: Any = None,
    prefix_strength: float = 1.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Hand a layer's attention to the states of the forward pass.

    Called by transformers (5.x, `AttentionInterface`) once per layer in place of its attention functions;
    ``engine_states`` is the keyword given to the model's forward, which every layer passes on.
    """
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    prefix = None if prefix_key_values is None else prefix_key_values[layer]
    # A gated prefix that is attached stands before no row: it is added, the same for all.
    in_front = None if prefix_gates is not None else prefix
    # States keep keys and values of one width; where a model has two (`glm4_moe_lite`), zeros fill the
    # narrower: they add nothing to a score, and come out as zeros that are cut off again.
    width = max(key.shape[-1], value.shape[-1])
    mixed_BQNH = engine_states.attend(
        layer,
        _widened(query, width),
        (_widened(key, width), _widened(value, width)),
        mask=attention_mask,
        prefix=in_front,
        prefix_strength=prefix_strength,
        scaling=scaling,
    )[..., : value.shape[-1]]
    if prefix is not None and prefix_gates is not None:
        mixed_BQNH = add_gated(mixed_BQNH, query, prefix, prefix_gates[layer], scaling=scaling)
    return mixed_BQNH, None


def _widened(states_BNQH: Tensor, width: int) -> Tensor:
    """Fill up the width of heads with zeros."""
    missing = width - states_BNQH.shape[-1]
    return nn.functional.pad(states_BNQH, (0, missing)) if missing else states_BNQH


def register_engine_attention() -> None:
    """Make `ENGINE_ATTENTION` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(ENGINE_ATTENTION, engine_attention)
    AttentionMaskInterface.register(ENGINE_ATTENTION, sdpa_mask)
