"""Reading prompts behind what was read already: a prefix, an earlier piece, a prompt that is shared.

Reading a text in several passes gives the same hidden states as one pass, as a causal model's token depends
only on those before it::

    pass 1   [prefix] first piece                     keys and values of the piece are kept
    pass 2   [prefix] [first piece] second piece      only the second piece passes through the layers
    pass 3   [prefix] [both] third piece              ..

The rows of a pass may stand behind the same tokens (questions behind the examples of a benchmark), or each
behind its own: then what is shorter is filled up with columns that nothing sees.

What follows a prompt is told by its last token alone. Of the other tokens the last layer owes nothing but
keys and values, so its attention and its MLP are computed for the last token of each row::

    layers 1 .. L-1   x x x x x x x x
    layer L           k k k k k k k x        k: keys and values only

Shapes: B rows, N query heads, K key/value heads, S own tokens, P columns in front of them, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.prompt_groups import LayerStates
from glmtune.inference.engine.states.gated import GatedRows, gated_rows
from glmtune.inference.engine.states.rows import PrefixStates


@dataclass(frozen=True, slots=True)
class Before:
    """What stands in front of the tokens that are read.

    Attributes:
        layers: rotated keys and values of tokens that were read, each ``[1, K, P, H]``; empty: none were.
        prefix: a tuned prefix in front of all.
    """

    layers: LayerStates = ()
    prefix: PrefixStates | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens were read already; a prefix has no positions and counts none."""
        return self.layers[0][0].shape[2] if self.layers else 0

    @property
    def num_columns(self) -> int:
        """How many columns attention sees in front, those of the prefix included."""
        return self.num_tokens + self.num_prefix

    @property
    def num_prefix(self) -> int:
        """How many of them are of the prefix: none of a gated one, which is attended to apart."""
        return self.prefix.num_columns if self.prefix else 0

    def parts(self, layer: int) -> list[KeysValues]:
        """Return the keys and values of a layer, in the order of their columns."""
        found = [self.prefix.layers[layer]] if self.prefix and self.num_prefix else []
        return [*found, *self.layers[layer : layer + 1]]


class KeysValuesKnown(Exception):
    """Ends the last layer's pass over all tokens, of which nothing more is needed."""


class ReadStates:
    """The attention of one pass over prompts.

    Attributes:
        own: keys and values of the prompts' own tokens per layer, each ``[B, K, S, H]``, where kept.
    """

    def __init__(
        self, before: Sequence[Before], *, keep: bool, last_layer: int = -1, lengths: Sequence[int] = ()
    ) -> None:
        """Start before the first layer.

        Args:
            before: what stands in front of each row, or a single one that stands in front of all.
            keep: whether to remember the tokens' keys and values.
            last_layer: the layer that is asked for each row's last token alone; -1: none is.
            lengths: own tokens of each row; needed where a layer is.
        """
        self.own: list[KeysValues] = []
        self._before, self._keep = before, keep
        self._last_layer, self._lengths = last_layer, lengths
        self._last_own: KeysValues | None = None
        # One serves all layers of a device but the last.
        self._masks: dict[tuple[torch.device, bool], Tensor] = {}
        self._gated: dict[torch.device, list[GatedRows]] = {}

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
        """Attend to what stands in front and, causally, to the row's own; see `AttentionStates`.

        Raises:
            KeysValuesKnown: it is the last layer, called with all tokens; see `last_tokens_only`.
        """
        if self._last_own is not None:
            own, mask = self._last_own, self._before_end(query.device)
        else:
            if self._keep:
                self.own.append(own)
            if layer == self._last_layer:
                self._last_own = own
                raise KeysValuesKnown
        mixed_BQNH = self._attend_columns(layer, query, own, mask, prefix, prefix_strength, scaling)
        if query.device not in self._gated:
            self._gated[query.device] = gated_rows([each.prefix for each in self._before], query.device)
        for rows in self._gated[query.device]:
            mixed_BQNH = rows.add(mixed_BQNH, query, layer, scaling)
        return mixed_BQNH

    def _attend_columns(
        self,
        layer: int,
        query: Tensor,
        own: KeysValues,
        mask: Tensor | None,
        prefix: KeysValues | None,
        prefix_strength: float,
        scaling: float,
    ) -> Tensor:
        """Attend to all but gated prefixes, in one softmax."""
        attached = 0 if prefix is None else prefix[0].shape[2]
        width = attached + max(before.num_columns for before in self._before)
        if not width:
            return _attend_grouped(query, *own, mask, scaling).transpose(1, 2)
        # Joined for one call of the fused attention, which does not return the log-sum-exp that merging
        # separate parts needs; reading is bound by arithmetic, so the copies hardly count.
        join = self._beside_each if len(self._before) > 1 else self._before_all
        keys, values = join(layer, own, prefix, width)
        key = (query.device, self._last_own is not None)
        if key not in self._masks:
            self._masks[key] = self._visible(query, mask, attached, width, prefix_strength)
        return _attend_grouped(query, keys, values, self._masks[key], scaling).transpose(1, 2)

    def _before_end(self, device: torch.device) -> Tensor:
        """Show the last token of each row the row's own tokens and no padding, ``[B, 1, 1, S]``."""
        assert self._last_own is not None
        lengths_B = torch.tensor(self._lengths, device=device)
        column_S = torch.arange(self._last_own[0].shape[2], device=device)
        return (column_S < lengths_B[:, None])[:, None, None]

    def _before_all(
        self, layer: int, own: KeysValues, prefix: KeysValues | None, width: int
    ) -> tuple[Tensor, Tensor]:
        """Join what stands in front of all rows with their own, ``[B, K, P + S, H]``."""
        del width
        parts = ([] if prefix is None else [prefix]) + self._before[0].parts(layer)
        rows = len(own[0])
        keys = [part[0].to(own[0]).expand(rows, -1, -1, -1) for part in parts]
        values = [part[1].to(own[1]).expand(rows, -1, -1, -1) for part in parts]
        return torch.cat([*keys, own[0]], dim=2), torch.cat([*values, own[1]], dim=2)

    def _beside_each(
        self, layer: int, own: KeysValues, prefix: KeysValues | None, width: int
    ) -> tuple[Tensor, Tensor]:
        """Join what stands in front of each row with its own; the columns in between are zeros."""
        joined: list[Tensor] = []
        for place in (0, 1):
            rows, heads, size, channels = own[place].shape
            # Zeros, not merely memory: what is hidden has weight 0, and 0 times NaN would be NaN.
            whole = own[place].new_zeros(rows, heads, width + size, channels)
            whole[:, :, width:] = own[place]
            for row, before in enumerate(self._before):
                parts = [] if prefix is None else [(prefix[0][:1], prefix[1][:1])]
                start = 0
                for part in (*parts, *before.parts(layer)):
                    stop = start + part[place].shape[2]
                    whole[row, :, start:stop] = part[place][0]
                    start = stop
            joined.append(whole)
        return joined[0], joined[1]

    def _visible(
        self, query: Tensor, mask: Tensor | None, attached: int, width: int, attached_strength: float
    ) -> Tensor:
        """Show every query what stands in front of its row and the row's own up to itself.

        PyTorch's ``is_causal`` cannot say that: with more keys than queries it aligns the first of both, as
        if the queries were the first tokens.

        Args:
            query: tells type and sizes.
            mask: over own tokens, of ChatGLM-6B, whose prompt sees itself in both directions; None: causal.
            attached: columns of a prefix that is attached to the model.
            width: columns in front, P.
            attached_strength: of the prefix that is attached.

        Returns:
            ``[B or 1, 1, S, P + S]``, boolean (True = visible) or additive.
        """
        size, device = query.shape[2], query.device
        if mask is None:
            mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=device).tril()
        lengths = [attached + before.num_columns for before in self._before]
        strengths = [before.prefix.strength if before.prefix else 1.0 for before in self._before]
        column = torch.arange(width, device=device)
        shown = column[None] < torch.tensor(lengths, device=device)[:, None]
        if all(strength == 1 for strength in (attached_strength, *strengths)) and mask.dtype == torch.bool:
            return _beside(shown[:, None, None], mask)
        # A strength s adds log s to the scores of the prefix's columns: their weights, before they are
        # divided by the sum of all, are s times as large.
        front = torch.zeros(shown.shape, dtype=query.dtype, device=device).masked_fill(~shown, -torch.inf)
        front[:, :attached] = math.log(attached_strength)
        for row, (before, strength) in enumerate(zip(self._before, strengths, strict=True)):
            front[row, attached : attached + before.num_prefix] = math.log(strength)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=device).masked_fill(~mask, -torch.inf)
        return _beside(front[:, None, None], mask.to(query.dtype))


@contextmanager
def last_tokens_only(layer: Any, lengths: Sequence[int]) -> Generator[None]:
    """Compute a model's last layer for the last token of each row, for the time of a block.

    The layer is called twice: with all tokens, until its attention has keys and values and `ReadStates` ends
    that pass; and with the last tokens.

    Args:
        layer: a decoder layer of transformers (5.x): called with hidden states ``[B, S, D]`` and keywords, of
            which ``position_embeddings`` and ``position_ids`` have a place for every token.
        lengths: own tokens of each row.
    """
    whole: Callable[..., Tensor] = layer.forward
    own = [value for name, value in layer.__dict__.items() if name == "forward"]  # of accelerate's hooks

    def forward(hidden_BSD: Tensor, **kwargs: Any) -> Tensor:
        try:
            return whole(hidden_BSD, **kwargs)
        except KeysValuesKnown:
            pass
        ends_B = torch.tensor(lengths, device=hidden_BSD.device) - 1

        def last(values: Tensor) -> Tensor:
            every = values.expand(len(ends_B), *values.shape[1:])
            return every[torch.arange(len(ends_B), device=values.device), ends_B.to(values.device)][:, None]

        kwargs["position_embeddings"] = tuple(map(last, kwargs["position_embeddings"]))
        kwargs["position_ids"] = last(kwargs["position_ids"])
        return whole(last(hidden_BSD), **kwargs)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own:
            layer.forward = own[0]


def _beside(front: Tensor, own: Tensor) -> Tensor:
    """Put masks ``[B or 1, 1, 1, P]`` and ``[B or 1, 1, S, S]`` side by side."""
    rows, size = max(len(front), len(own)), own.shape[2]
    return torch.cat([front.expand(rows, 1, size, -1), own.expand(rows, 1, size, -1)], dim=3)


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
