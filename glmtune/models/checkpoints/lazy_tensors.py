"""Tensors by name, each made when it is asked for: a whole model's weights without a whole model's memory.

Chains of them (read → dequantize → merge → rename) describe an export of 19 GB and hold one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


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
