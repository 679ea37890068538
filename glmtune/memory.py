"""Running out of memory: how it is told from other errors, and how freed memory is given back."""

from __future__ import annotations

import ctypes
import gc

import torch

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")
"""Words of PyTorch, its allocators and BLAS libraries where no type of error says it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def release_memory() -> None:
    """Give back what is no longer used, so that the next attempt finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim_memory() -> None:
    """Hand freed memory back to the system; glibc keeps it otherwise, block by block up to the whole model.

    Does nothing where the C library has no such call.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return
