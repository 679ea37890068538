"""Write weights into safetensors shards, holding one shard in memory at a time.

What is written are tensors by name, each made when it is asked for: chains of them (read → dequantize → merge
→ rename) describe an export of 19 GB and hold one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glmtune.memory import trim_memory
from glmtune.models.checkpoints.shards import INDEX_SUFFIX, SAFETENSORS_FILE
from glmtune.storage.files import write_atomically, write_json


class LazyTensors(Mapping[str, Tensor]):
    """Names and what makes their tensors; nothing is kept.

    Attributes:
        shapes: name → shape, known without making the tensor: files are planned before anything is read.
    """

    def __init__(
        self, makers: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Take the table.

        Args:
            makers: name → function that returns the tensor.
            shapes: the same names → shape.
        """
        assert makers.keys() == shapes.keys()
        self._makers = dict(makers)
        self.shapes = dict(shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return how many bytes a tensor takes."""
    return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class WrittenShards:
    """What was written.

    Attributes:
        files: the shards, then their index if there are several.
        num_bytes: of all tensors.
    """

    files: tuple[Path, ...]
    num_bytes: int


def write_shards(
    folder: Path,
    tensors: LazyTensors,
    *,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int,
    on_shard: Callable[[int, int], object] = lambda done, total: None,
) -> WrittenShards:
    """Write ``model.safetensors``, or ``model-0000x-of-0000y.safetensors`` and their index.

    Each file appears whole or not at all, and the index after all it names.

    Args:
        folder: exists; its files of these names are replaced, others stay.
        tensors: written in this order, each made once.
        dtypes: name → type to store.
        max_shard_bytes: a new file begins where the next tensor would exceed it.
        on_shard: told after each file how many are written, and of how many.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    # File names hold the number of shards, so all are planned, from shapes alone, before any tensor is made.
    sizes = {name: num_bytes(shape, dtypes[name]) for name, shape in tensors.shapes.items()}
    shards = _plan(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = SAFETENSORS_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, tensors, {name: dtypes[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
        trim_memory()
        on_shard(number, len(shards))
    files = [folder / file for file in dict.fromkeys(weight_map.values())]
    total = sum(sizes.values())
    if len(shards) > 1:
        files.append(folder / f"{SAFETENSORS_FILE}{INDEX_SUFFIX}")
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(files[-1], index)
    return WrittenShards(tuple(files), total)


def _write_shard(file: Path, tensors: LazyTensors, dtypes: Mapping[str, torch.dtype]) -> None:
    shard: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, dtype in dtypes.items():
        tensor = tensors[name].detach().to("cpu", dtype).contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # A tied head is the embedding's own memory, but safetensors gives every name bytes of its own.
        shard[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    # transformers 4 refuses files that do not say which framework's tensors they hold.
    write_atomically(file, lambda path: save_file(shard, path, metadata={"format": "pt"}))


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
