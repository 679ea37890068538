"""HQQ through its own library: scale and zero point of every group by half-quadratic optimization.

What it makes is stored in glmtune's group-wise format, so the library is needed for quantizing only.

Source:
    Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; package ``hqq``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmtune.errors import ConfigError, ShapeError
from glmtune.quantization.arithmetic.primitives import SCALE_DTYPE, QuantizedTensor


def quantize_hqq(weight_OI: Tensor, *, bits: int, group_size: int) -> QuantizedTensor:
    """Quantize with a scale and a zero point per group of columns.

    Args:
        weight_OI: float ``[O, I]``, any float dtype; computed in float32.
        bits: 4 or 8.
        group_size: columns sharing a scale; must divide I.

    Returns:
        Codes, scales and zero points.

    Raises:
        ConfigError: the package ``hqq`` is not installed.
        ShapeError: I is no multiple of the group size.
    """
    try:
        from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"`quantization` is `int{bits}-g{group_size}-hqq`, which needs the package `hqq`, and it is not "
            f"installed. Run `pip install hqq`, or use `int{bits}-g{group_size}-asym`, which is near to it."
        ) from None
    rows, columns = weight_OI.shape
    if columns % group_size:
        raise ShapeError(
            f"HQQ's groups of {group_size} columns must divide the input width, but a layer has {columns}. "
            f"Use `int{bits}-g{group_size}-asym`, whose last group may be smaller, or leave it out (`skip`)."
        )
    # axis=1: groups of neighbouring columns, as ours; bitpack=False: a byte per code, we pack ourselves.
    codes, found = Quantizer.quantize(
        weight_OI.float(), nbits=bits, group_size=group_size, axis=1, bitpack=False, device="cpu"
    )
    middle, shape = 2 ** (bits - 1), (rows, columns // group_size)
    scale_OG, zero_OG = found["scale"].float().reshape(shape), found["zero"].float().reshape(shape)
    # HQQ: weight = (code − zero) · scale with codes 0 .. 15 and a zero point in codes. Ours:
    # signed codes, and a zero point in units of the weight, so that code · scale + zero is
    # one multiplication and one addition.
    return QuantizedTensor(
        (codes.reshape(rows, columns) - middle).to(torch.int8),
        scale_OG.to(SCALE_DTYPE),
        ((middle - zero_OG) * scale_OG).to(SCALE_DTYPE),
        group_size,
    )
