"""Write weights into safetensors shards, holding one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from glmtune.files import write_json
from glmtune.memory import trim_memory
from glmtune.models.checkpoints.lazy_tensors import LazyTensors, num_bytes
from glmtune.models.checkpoints.shards import INDEX_SUFFIX, SAFETENSORS_FILE


def write_shards(
    folder: Path,
    tensors: LazyTensors,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    on_shard: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Write ``model.safetensors``, or ``model-0000x-of-0000y.safetensors`` and their index.

    Args:
        folder: exists; its files of these names are replaced.
        tensors: written in this order, each made once.
        dtype: floating type to store.
        max_shard_bytes: a new file begins where the next tensor would exceed it.
        on_shard: told after each file how many are written, and of how many.

    Returns:
        Bytes of all tensors.
    """
    sizes = {name: num_bytes(shape, dtype) for name, shape in tensors.shapes.items()}
    shards = _plan(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = SAFETENSORS_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: tensors[name].detach().to(dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod((folder.stat().st_mode & 0o666) | 0o600)  # as readable as the folder
        weight_map |= dict.fromkeys(names, file)
        del shard
        trim_memory()
        on_shard(number, len(shards))
    total = sum(sizes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{SAFETENSORS_FILE}{INDEX_SUFFIX}", index)
    return total


def _plan(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
