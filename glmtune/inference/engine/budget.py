"""How much is done at once, and how that shrinks when memory runs out.

How much fits is estimated and then corrected by failing: activations, fragmentation and other programs on
the device cannot be computed beforehand. What failed is halved, so that the right size is found to within a
factor of two in a few tries, and it never grows again: each further try would cost a lost forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from glmtune.errors import GlmtuneError
from glmtune.prefix.encoder import prefix_shape

LOGGER = logging.getLogger(__name__)
USABLE_FRAC = 0.4
"""Share of the free memory that keys and values may take; the rest is for activations, logits, and the copy
of a layer's keys and values while they grow."""


@dataclass
class Budget:
    """Limits of a batch.

    Attributes:
        rows: most rows at once.
        held_tokens: most tokens whose keys and values are held.
        read_tokens: most tokens read in one forward pass.
    """

    rows: int
    held_tokens: int
    read_tokens: int

    def rows_to_read(self, lengths: Sequence[int], num_shared: int) -> int:
        """Count how many of the first prompts may be read at once, at least one.

        Args:
            lengths: own tokens of the prompts waiting, in the order in which they are to be read.
            num_shared: tokens of the shared prompt in front of each.
        """
        width = 0
        for count, length in enumerate(lengths[: self.rows], start=1):
            width = max(width, length)  # shorter prompts are padded to it
            fits = count * width <= self.read_tokens and count * (width + num_shared) <= self.held_tokens
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
        " (`model.dtype=bfloat16`), use fewer exemplars, or free memory."
    )


def tokens_that_fit(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Estimate how many tokens' keys and values fit into the memory that is free now.

    Args:
        config: of the model, in native form.
        dtype: of keys and values.
        device: where they lie.

    Returns:
        Tokens, at least 1.
    """
    is_cuda = device.type == "cuda"
    free_bytes = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    bytes_per_token = prefix_shape(config).kv_width * dtype.itemsize
    return max(1, int(USABLE_FRAC * free_bytes / bytes_per_token))
