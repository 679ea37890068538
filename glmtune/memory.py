"""What happens when memory runs out, and how many tokens fit before it does."""

from __future__ import annotations

import gc

import psutil
import torch
from transformers import PretrainedConfig

from glmtune.prefix.encoder import prefix_shape

USABLE_FRAC = 0.4
"""Share of the free memory that keys and values may take; the rest is for activations."""


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out, on whatever device."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )


def release_memory() -> None:
    """Give back what is no longer used, so that the next attempt finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
