"""Memory of devices: how much is free or was in use, how its end is told from other errors, giving it back.

CUDA, NPU and XPU have a module of PyTorch each, which answer the same questions. MPS has no memory of its own
but a part of the machine's, of which Metal names the size, and PyTorch keeps no peak of it. On the CPU memory
is that of the machine and of this process.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import psutil
import torch

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")
"""Words of PyTorch, its allocators and BLAS libraries where no type of error says it."""
WITH_OWN_MEMORY = ("cuda", "npu", "xpu")
"""Kinds of devices whose memory is not the machine's."""


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device now.

    Args:
        device: any; on MPS what Metal still gives, or the machine's free memory where that is less.
    """
    host: int = psutil.virtual_memory().available
    if device.type == "mps":
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(host, left))
    if device.type not in WITH_OWN_MEMORY:
        return host
    module = _module(device)
    try:
        return int(module.mem_get_info(device)[0])
    except RuntimeError:  # XPU: the graphics units of some processors do not tell what others use
        return total_bytes(device) - int(module.memory_reserved(device))


def total_bytes(device: torch.device) -> int:
    """Return the memory that a device has; MPS: what Metal gives at most."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type not in WITH_OWN_MEMORY:
        return psutil.virtual_memory().total
    return int(_module(device).get_device_properties(device.index or 0).total_memory)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory of a device that this process had in use.

    MPS: what it holds now, which is about the peak, as Metal's allocator keeps what it took. CPU: the memory
    of the process now.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type not in WITH_OWN_MEMORY:
        return psutil.Process().memory_info().rss
    return int(_module(device).max_memory_allocated(device))


def device_name(device: torch.device) -> str:
    """Return what its maker calls a device; ``CPU`` and ``MPS``, which PyTorch has no name for."""
    if device.type not in WITH_OWN_MEMORY:
        return device.type.upper()
    return str(_module(device).get_device_name(device.index or 0))


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given, which runs behind on all but the CPU."""
    if device.type == "mps" or device.type in WITH_OWN_MEMORY:
        _module(device).synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def release_memory() -> None:
    """Give back what is no longer used, so that the next attempt finds it."""
    gc.collect()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    for kind in WITH_OWN_MEMORY:
        module: Any = getattr(torch, kind, None)  # `torch.npu` is there once its extension is loaded
        if module is not None and module.is_available():
            module.empty_cache()


def trim_memory() -> None:
    """Hand freed memory back to the system; glibc keeps it otherwise, block by block up to the whole model.

    Does nothing where the C library has no such call.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type)
