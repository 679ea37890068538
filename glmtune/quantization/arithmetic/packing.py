"""Codes to bytes and back; rounding is elsewhere (`glmtune.quantization.arithmetic.primitives`)."""

from __future__ import annotations

import torch
from torch import Tensor

from glmtune.errors import ShapeError


def pack(codes_OI: Tensor, *, bits: int) -> Tensor:
    """Pack codes as the released files hold them.

    Args:
        codes_OI: int8 ``[O, I]`` in −8 .. 7 (4 bits), or any int8 (8 bits).
        bits: 4 or 8.

    Returns:
        int8: the codes themselves, or ``[O, I / 2]``: the even column in the high half of a byte, the odd one
        in the low half, two's complement.

    Raises:
        ShapeError: 4 bits and an odd number of columns.

    >>> pack(torch.tensor([[1, -1, 7, -8]], dtype=torch.int8), bits=4).tolist()
    [[31, 120]]
    """
    if bits == 8:
        return codes_OI
    if codes_OI.shape[-1] % 2:
        raise ShapeError(
            f"The codes have {codes_OI.shape[-1]} columns, but 4 bits need an even number: a byte holds two. "
            "Use 8 bits, or leave that layer out (`skip`)."
        )
    return (codes_OI[..., 0::2] << 4) | (codes_OI[..., 1::2] & 0x0F)


def unpack(packed: Tensor, *, bits: int) -> Tensor:
    """Return the codes in packed bytes; the inverse of `pack`.

    Args:
        packed: int8 ``[O, I]`` (8 bits) or ``[O, I / 2]`` (4 bits).
        bits: 4 or 8.

    Returns:
        int8 ``[O, I]``.

    >>> unpack(torch.tensor([[31, 120]], dtype=torch.int8), bits=4).tolist()
    [[1, -1, 7, -8]]
    """
    if bits == 8:
        return packed
    high, low = packed >> 4, (packed << 4) >> 4  # int8 shifts keep the sign
    return torch.stack((high, low), dim=-1).flatten(-2)
