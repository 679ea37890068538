"""Codes to bytes and back; rounding is elsewhere (`glmtune.quantization.arithmetic.primitives`).

INT8 codes are bytes already. Two INT4 codes share a byte, in the order of the released files
(``compress_int4_weight`` in ``quantization.py`` of THUDM/chatglm-6b), so what is written here loads there and
the other way round::

    column:      0    1    2    3             bit:  7 6 5 4   3 2 1 0
    code:        1   -1    7   -8             byte: column 0  column 1
    byte:      [0x1F    ] [0x78    ]                high half low half

The halves are two's complement: -1 is 0xF, -8 is 0x8.
"""

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
    # The mask matters for negative odd columns: their sign bits would overwrite the high half.
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
    # Shifts of int8 to the right are arithmetic, so the top bit of each half becomes the sign of its code.
    high, low = packed >> 4, (packed << 4) >> 4
    return torch.stack((high, low), dim=-1).flatten(-2)
