"""The layout of PyTorch's INT4 product on CPUs, and the way back from it to the layout of checkpoints.

With a way back, the packed codes can be the only copy in memory: saving, casting and the plain path unpack
them. A panel of 64 outputs (AVX-512; 32: AVX2) is stored column after column, 32 bytes each::

    byte h of a column:   | output 32 + h | output h |      h = 0 .. 31, code + 8 in each half
    outputs beyond the last whole panel:
    byte h of a column:   | output 2h + 1 | output 2h |

PyTorch promises nothing of this (it is in its source,
`aten/src/ATen/native/cpu/int4mm_kernel.cpp`), so `panel_outputs` packs a small weight and looks
whether it comes back; where it does not, the layer keeps its codes.

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
"""What the product expects to be added to a code: 0 .. 15 instead of -8 .. 7."""


class Int4Packed:
    """Codes in PyTorch's layout; a `glmtune.quantization.layers.linear.PackedStorage`.

    Attributes:
        bytes: uint8 ``[O, I / 2]``, what the product reads; the shape says nothing about the order.
        names: the codes only; scales stay in the layer.
    """

    names = ("weight",)

    def __init__(self, bytes: Tensor, panel: int) -> None:
        """Take packed bytes, and how many outputs make a panel."""
        self.bytes, self._panel = bytes, panel

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the codes of some outputs in the order of checkpoints; ``start`` begins a panel."""
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
    # 176 = 2 x 64 + 48 = 5 x 32 + 16: whole panels of either size and a rest are tried.
    codes_OI = torch.randint(-8, 8, (176, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    bytes = packed_int4(codes_OI)
    for panel in PANELS:
        if torch.equal(Int4Packed(bytes, panel).tensor("weight"), pack(codes_OI, bits=4)):
            return panel
    return None
