"""The layout of PyTorch's INT4 product on CPUs, unpacked again: the packed codes are the only copy then.

A panel of 64 outputs (AVX-512; 32: AVX2) holds half as many bytes per column: the first half of its outputs
in the lower four bits, the other half in the upper ones. Outputs that make no whole panel lie two by two in a
byte. Nothing of this is promised by PyTorch, so it is tried out once.

Shapes: O output features, I input features, P panels, H bytes of a column in a panel.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from glmtune.quantization.arithmetic.packing import pack

PANELS = (64, 32)
"""Outputs of a panel, by instruction set."""
OFFSET = 8
"""What the product adds to a code."""


class Int4Packed:
    """Codes in PyTorch's layout; see `glmtune.quantization.layers.linear.Stored`.

    Attributes:
        bytes: uint8 ``[O, I / 2]``, what the product reads; the shape says nothing about the order.
        names: see `Stored`.
    """

    names = ("weight",)

    def __init__(self, bytes: Tensor, panel: int) -> None:
        """Take packed bytes, and how many outputs make a panel."""
        self.bytes, self._panel = bytes, panel

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the codes of some outputs as layers store them, see `Stored`; ``start`` begins a panel."""
        del name  # it is the only one
        outputs, half_inputs = self.bytes.shape
        stop = outputs if stop is None else min(stop, outputs)
        whole = start + (stop - start) // self._panel * self._panel
        flat = self.bytes.reshape(-1)
        panels = flat[start * half_inputs : whole * half_inputs].reshape(
            -1, 2 * half_inputs, self._panel // 2
        )
        found = [torch.cat(_halves(panels), dim=1).flatten(0, 1)]
        if whole < stop:
            rest = flat[whole * half_inputs :].reshape(1, 2 * half_inputs, -1)
            found.append(torch.stack(_halves(rest), dim=2).flatten(0, 2))
        return torch.cat(found).view(torch.int8)


def _halves(bytes_PIH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes in the lower and in the upper four bits, ``[P, H, I / 2]``, two columns in a byte."""
    bytes_PHI = bytes_PIH.transpose(1, 2).contiguous()
    even, odd = bytes_PHI[..., 0::2], bytes_PHI[..., 1::2]
    signs = 0x88  # code + 8 to two's complement, for both
    return ((even << 4) | (odd & 0x0F)) ^ signs, ((even & 0xF0) | (odd >> 4)) ^ signs


def packed_int4(codes_OI: Tensor) -> Tensor:
    """Return codes, int8 ``[O, I]`` in -8 .. 7, as the product reads them."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.to(torch.int32) + OFFSET, 1)


@functools.cache
def panel_outputs() -> int | None:
    """Return how many outputs make a panel on this processor; None: the layout is another one."""
    codes_OI = torch.randint(-8, 8, (176, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    bytes = packed_int4(codes_OI)
    for panel in PANELS:
        if torch.equal(Int4Packed(bytes, panel).tensor("weight"), pack(codes_OI, bits=4)):
            return panel
    return None
