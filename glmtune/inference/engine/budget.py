"""How much is done at once, and how that shrinks when memory runs out.

How much fits is estimated and then corrected by failing: activations, fragmentation and other programs on
the device cannot be computed beforehand. What failed is halved, so that the right size is found to within a
factor of two in a few tries, and it does not grow again while there is work: each further try would cost a
lost forward pass.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from glmtune.errors import GlmtuneError
from glmtune.memory import free_bytes
from glmtune.prefix.encoder import prefix_shape

LOGGER = logging.getLogger(__name__)
USABLE_FRAC = 0.4
"""Share of the free memory that keys and values may take; the rest is for activations, logits, and the copy
of a layer's keys and values while they grow."""
SCALE_BYTES = 4
"""Of the codes of one head of a token, beside a byte for each."""


@dataclass
class Budget:
    """Limits of a batch.

    Attributes:
        rows: most rows at once.
        held_tokens: most tokens that there is memory for: the keys and values of rows, with room for tokens
            to come, and those kept of finished ones. What is copied within a step comes on top.
        read_tokens: most tokens read in one forward pass.
        token_bytes: that keys and values of a token take in all layers.
    """

    rows: int
    held_tokens: int
    read_tokens: int
    token_bytes: float = 0.0

    def __post_init__(self) -> None:
        """Remember the limits of the beginning."""
        self._begun_with = (self.rows, self.read_tokens)

    def recover(self) -> None:
        """Try as much as at the beginning again."""
        self.rows, self.read_tokens = self._begun_with

    def rows_to_read(self, lengths: Sequence[int], before: Sequence[int], limit: int | None = None) -> int:
        """Count how many of the first prompts may be read at once, at least one.

        Args:
            lengths: own tokens of the prompts waiting, in the order in which they are to be read.
            before: columns that stand in front of each.
            limit: most tokens of this pass; None: ``read_tokens``.
        """
        limit = self.read_tokens if limit is None else limit
        width = front = 0
        for count, (length, columns) in enumerate(
            zip(lengths[: self.rows], before[: self.rows], strict=True), start=1
        ):
            width, front = max(width, length), max(front, columns)  # shorter ones are padded to it
            fits = count * width <= limit and count * (width + front) <= self.held_tokens
            if count > 1 and not fits:  # one alone is tried whatever its length: there is no smaller batch
                return count - 1
        return min(len(lengths), self.rows)

    def rows_to_hold(self, row_tokens: int) -> int:
        """Count how many rows that may grow to ``row_tokens`` fit, at least one.

        Counted by what rows may become, not by what they are: a batch that fills up later would have to
        send requests back, and their prompts would be read a second time.
        """
        return max(1, min(self.rows, self.held_tokens // row_tokens))

    def halve(self, num_rows: int) -> None:
        """Take half of a number of rows that was too much; log it."""
        LOGGER.warning("Out of memory with %d rows at once; going on with %d.", num_rows, num_rows // 2)
        self.rows = max(1, num_rows // 2)

    def halve_reading(self, num_rows: int, width: int) -> None:
        """Read half of a number of prompts that was too much; log it."""
        LOGGER.warning("Out of memory reading %d prompts; going on with %d.", num_rows, num_rows // 2)
        self.read_tokens = num_rows // 2 * width


def no_memory(num_tokens: int) -> GlmtuneError:
    """Word the error for a single prompt that does not fit."""
    return GlmtuneError(
        f"Memory does not suffice for one prompt of {num_tokens} tokens. Load the model in a smaller dtype"
        " (`model.dtype=bfloat16`), shorten the prompt (`data.max_source_length`, fewer exemplars), lower"
        " `max_new_tokens`, or free memory."
    )


def bytes_per_token(config: PretrainedConfig, kv_cache: str, dtype: torch.dtype) -> float:
    """Return what keys and values of one token take in all layers.

    Args:
        config: of the model, in native form.
        kv_cache: how they are kept, one of `glmtune.models.settings.KV_CACHES`.
        dtype: of the hidden state.
    """
    shape = prefix_shape(config)
    # Attention that is widened from a few numbers has heads of other widths than its config's `head_dim`.
    widths = (getattr(config, "qk_head_dim", None), getattr(config, "v_head_dim", None))
    head_dim = max((width for width in widths if width), default=shape.head_dim)
    number_bytes = dtype.itemsize if kv_cache == "plain" else 1 + SCALE_BYTES / head_dim
    return shape.kv_width * head_dim / shape.head_dim * number_bytes


def tokens_that_fit(token_bytes: float, layer_devices: Sequence[torch.device]) -> int:
    """Estimate how many tokens' keys and values fit into the memory that is free now.

    Args:
        token_bytes: that keys and values of a token take.
        layer_devices: where each layer lies, and its keys and values.

    Returns:
        Tokens, at least 1.
    """
    shares = Counter(layer_devices)  # of a model that is split: each device holds what its layers need
    return max(
        1,
        min(
            int(USABLE_FRAC * free_bytes(device) / (token_bytes * count / len(layer_devices)))
            for device, count in shares.items()
        ),
    )
