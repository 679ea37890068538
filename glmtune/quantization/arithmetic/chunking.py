"""Quantize and dequantize a few rows at a time.

Rows of a weight do not depend on each other in any method but GPTQ, so a chunk of them may be read, quantized
and packed before the next is read. A search over clip ranges holds several float32 copies of what it works
on: of a whole 13,696 x 4,096 weight that would be gigabytes, of a chunk it stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.quantized_layout import SCALE, ZERO
from glmtune.quantization.arithmetic.methods import QuantizationMethod
from glmtune.quantization.arithmetic.packing import pack, unpack
from glmtune.quantization.arithmetic.primitives import (
    CHUNK_WEIGHTS,
    QuantizedTensor,
    dequantize,
    signal_and_noise,
)

ReadRows = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A whole weight as bytes, and what quantization lost.

    Attributes:
        tensors: ``weight`` (packed), ``weight_scale`` and, with zero points, ``weight_zero``.
        signal: sum of squares of the weight; 0 where it was not measured.
        noise: sum of squares of the difference.
    """

    tensors: dict[str, Tensor]
    signal: float
    noise: float


def quantize_in_chunks(
    method: QuantizationMethod, shape: tuple[int, ...], read: ReadRows, *, name: str, measure: bool
) -> QuantizedRows:
    """Quantize a weight by rows.

    Args:
        method: how.
        shape: ``[out, in]``.
        read: returns rows ``start`` to ``stop`` of the weight, any float dtype.
        name: of the layer, for errors.
        measure: compare with the weight.

    Raises:
        CheckpointError: the weight holds numbers that are not finite, or beyond a float16 scale.
        ShapeError: see `pack`.
    """
    rows, columns = shape
    parts: dict[str, list[Tensor]] = {}
    signal = noise = 0.0
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):  # groups never cross a row, so chunks of whole rows change no result
        weight_OI = read(start, min(rows, start + step))
        quantized = method.quantize(weight_OI)
        # Both are needed: a search gives a group with a NaN the scale 1 (`_storable`), and a finite bfloat16
        # weight can be too large for a float16 scale.
        if not (torch.isfinite(quantized.scale).all() and torch.isfinite(weight_OI).all()):
            raise CheckpointError(
                f"{name} cannot be quantized: rows {start} to {start + len(weight_OI) - 1} hold numbers "
                "that are not finite, or too large for a float16 scale. The checkpoint is damaged: fetch it "
                "again, or leave this layer out (`skip`)."
            )
        parts.setdefault("weight", []).append(pack(quantized.codes_OI, bits=method.bits))
        parts.setdefault(SCALE, []).append(quantized.scale)
        if quantized.zero is not None:
            parts.setdefault(ZERO, []).append(quantized.zero)
        if measure:
            more = signal_and_noise(weight_OI, dequantize(quantized))
            signal, noise = signal + more[0], noise + more[1]
    return QuantizedRows({part: torch.cat(chunks) for part, chunks in parts.items()}, signal, noise)


def dequantize_packed(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight behind bytes, unpacked and scaled a chunk of rows at a time.

    Args:
        packed: int8 ``[O, I]``, or ``[O, I / 2]`` (4 bits).
        scale: see `QuantizedTensor`.
        zero: see `QuantizedTensor`.
        bits: 4 or 8.
        group_size: see `QuantizedTensor`.
        dtype: of the result.

    Returns:
        ``[O, I]``, the same numbers as `dequantize` gives.
    """

    def rows(start: int, stop: int) -> Tensor:
        part = None if zero is None else zero[start:stop]
        codes_OI = unpack(packed[start:stop], bits=bits)
        return dequantize(QuantizedTensor(codes_OI, scale[start:stop], part, group_size), dtype)

    size, columns = len(packed), packed.shape[1] * 8 // bits
    step = max(1, CHUNK_WEIGHTS // columns)
    if packed.device.type != "cpu" or size <= step:  # on a GPU every chunk would cost several kernel launches
        return rows(0, size)
    weight_OI = torch.empty(size, columns, dtype=dtype)
    for start in range(0, size, step):
        weight_OI[start : start + step] = rows(start, start + step)
    return weight_OI
