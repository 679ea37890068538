# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportIndexIssue=false
# pyright: reportMissingParameterType=false
"""Triton kernels for GPUs: products with INT4 and INT8 codes as they are stored, and their input gradients.

This module needs Triton and is imported only where `glmtune.quantization.kernels.dispatch` asks for it. With
``TRITON_INTERPRET=1`` set before the import it runs on the CPU, slowly, which is how its tests run.

Two kernels, one for each direction. ``_codes_kernel`` (x Wᵀ) multiplies by the codes as they are: bfloat16
and float16 hold every code exactly, tensor cores add in float32, and a group's scale multiplies the group's
sum once instead of every weight. ``_gradient_kernel`` (dy W) sums over outputs, whose scales differ, so it
has to form the weight first.

Nothing is repacked. A byte of INT4 holds an even column in its high half and an odd one in its low half, and
a tensor core cannot take the two apart; so a tile is multiplied twice, even columns of x with the high
halves, odd columns with the low ones::

    bytes of W      [c0 c1] [c2 c3] [c4 c5] ..
    part 0 (>> 4)    c0      c2      c4         with x0 x2 x4 ..
    part 1 (& 15)       c1      c3      c5      with x1 x3 x5 ..

A zero point belongs to all columns of a group: it multiplies the sum of the inputs in it (``total_R``).
``WIDE`` in a kernel stands for the interpreter, which cannot multiply bfloat16 and gets float32.

Shapes: R input rows, O output features, I input features, G groups of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.quantization.layers.linear import QuantizedLinear

BLOCK_R, BLOCK_O = 32, 64
"""Rows and output features of a tile: 2,048 float32 sums, 16 registers a thread of four warps. Not tuned: no
GPU has run these kernels yet."""
ROW_BLOCK_I = 64
"""Input features added at once where a row has one scale; otherwise a group is, so that its
scale can be applied to its sum. Of INT4 half of them go into each product, still a multiple
of the 16 that a tensor core takes."""


@triton.jit
def _codes_kernel(
    x_ptr, code_ptr, scale_ptr, zero_ptr, y_ptr, num_rows, num_out, num_in, num_groups,
    x_stride, code_stride, BITS: tl.constexpr, GROUPED: tl.constexpr, HAS_ZERO: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Write one tile ``[BLOCK_R, BLOCK_O]`` of x Wᵀ; with groups, BLOCK_I is the group's size."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    IN_BYTE: tl.constexpr = 8 // BITS  # columns whose codes share a byte
    k = tl.arange(0, BLOCK_I // IN_BYTE)
    sum_RO = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    for block in range(0, tl.cdiv(num_in, BLOCK_I)):
        byte = block * (BLOCK_I // IN_BYTE) + k
        there = byte * IN_BYTE < num_in
        code_ptrs = code_ptr + o[:, None].to(tl.int64) * code_stride + byte[None, :]
        code_OK = tl.load(code_ptrs, mask=(o[:, None] < num_out) & there[None, :], other=0).to(tl.int32)
        part_RO = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
        total_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for part in tl.static_range(IN_BYTE):
            x_ptrs = x_ptr + r[:, None].to(tl.int64) * x_stride + (byte * IN_BYTE + part)[None, :]
            x_RK = tl.load(x_ptrs, mask=(r[:, None] < num_rows) & there[None, :], other=0.0)
            if BITS == 8:
                chosen_OK = code_OK
            elif part == 0:
                chosen_OK = code_OK >> 4
            else:
                chosen_OK = ((code_OK & 15) ^ 8) - 8  # four bits of two's complement, sign extended
            if HAS_ZERO:
                total_R += tl.sum(x_RK.to(tl.float32), axis=1)
            if WIDE:
                x_RK = x_RK.to(tl.float32)
            part_RO += tl.dot(x_RK, tl.trans(chosen_OK.to(x_RK.dtype)), input_precision="ieee")
        if GROUPED:
            scale_O = tl.load(scale_ptr + o * num_groups + block, mask=o < num_out, other=0.0)
            part_RO = part_RO * scale_O.to(tl.float32)[None, :]
            if HAS_ZERO:
                zero_O = tl.load(zero_ptr + o * num_groups + block, mask=o < num_out, other=0.0)
                part_RO += total_R[:, None] * zero_O.to(tl.float32)[None, :]
        sum_RO += part_RO
    if not GROUPED:
        scale_O = tl.load(scale_ptr + o, mask=o < num_out, other=0.0)
        sum_RO = sum_RO * scale_O.to(tl.float32)[None, :]
    y_ptrs = y_ptr + r[:, None].to(tl.int64) * num_out + o[None, :]
    tl.store(y_ptrs, sum_RO.to(y_ptr.dtype.element_ty), mask=(r[:, None] < num_rows) & (o[None, :] < num_out))


@triton.jit
def _gradient_kernel(
    dy_ptr, code_ptr, scale_ptr, zero_ptr, dx_ptr, num_rows, num_out, num_in, num_groups,
    dy_stride, code_stride, BITS: tl.constexpr, GROUPED: tl.constexpr, HAS_ZERO: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Write one tile ``[BLOCK_R, BLOCK_I]`` of dy W; with groups, BLOCK_I is the group's size."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    IN_BYTE: tl.constexpr = 8 // BITS
    byte = tl.program_id(1) * (BLOCK_I // IN_BYTE) + tl.arange(0, BLOCK_I // IN_BYTE)
    there = byte * IN_BYTE < num_in
    for part in tl.static_range(IN_BYTE):
        sum_RK = tl.zeros((BLOCK_R, BLOCK_I // IN_BYTE), dtype=tl.float32)
        for block in range(0, tl.cdiv(num_out, BLOCK_O)):
            o = block * BLOCK_O + tl.arange(0, BLOCK_O)
            dy_ptrs = dy_ptr + r[:, None].to(tl.int64) * dy_stride + o[None, :]
            dy_RO = tl.load(dy_ptrs, mask=(r[:, None] < num_rows) & (o[None, :] < num_out), other=0.0)
            code_ptrs = code_ptr + o[:, None].to(tl.int64) * code_stride + byte[None, :]
            code_OK = tl.load(code_ptrs, mask=(o[:, None] < num_out) & there[None, :], other=0).to(tl.int32)
            if BITS == 4:
                code_OK = code_OK >> 4 if part == 0 else ((code_OK & 15) ^ 8) - 8
            place = o * num_groups + tl.program_id(1) if GROUPED else o
            scale_O = tl.load(scale_ptr + place, mask=o < num_out, other=0.0)
            weight_OK = code_OK.to(tl.float32) * scale_O.to(tl.float32)[:, None]
            if HAS_ZERO:
                zero_O = tl.load(zero_ptr + place, mask=o < num_out, other=0.0)
                weight_OK += zero_O.to(tl.float32)[:, None]
            weight_OK = weight_OK.to(dy_RO.dtype)
            if WIDE:
                dy_RO, weight_OK = dy_RO.to(tl.float32), weight_OK.to(tl.float32)
            sum_RK += tl.dot(dy_RO, weight_OK, input_precision="ieee")
        dx_ptrs = dx_ptr + r[:, None].to(tl.int64) * num_in + (byte * IN_BYTE + part)[None, :]
        tl.store(dx_ptrs, sum_RK.to(dx_ptr.dtype.element_ty), mask=(r[:, None] < num_rows) & there[None, :])


class TritonProduct:
    """The product of one layer; nothing is copied, so it may be used for training, too.

    Attributes:
        dtypes: of the inputs it takes.
    """

    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def __init__(self, layer: QuantizedLinear) -> None:
        """Take codes and scales as they lie in a layer."""
        self._codes = layer.weight.detach()
        self._scale = layer.weight_scale.detach()
        self._zero = None if layer.weight_zero is None else layer.weight_zero.detach()
        self._size, self._bits, self._group = (
            (layer.out_features, layer.in_features),
            layer.bits,
            layer.group_size,
        )

    def __call__(self, x_RI: Tensor) -> Tensor:
        """Return ``x @ weight.T``, ``[R, O]``."""
        out = x_RI.new_empty(len(x_RI), self._size[0])
        grid = (triton.cdiv(len(x_RI), BLOCK_R), triton.cdiv(self._size[0], BLOCK_O))
        self._run(_codes_kernel, grid, x_RI, out)
        return out

    def input_gradient(self, dy_RO: Tensor) -> Tensor:
        """Return ``dy @ weight``, ``[R, I]``."""
        out = dy_RO.new_empty(len(dy_RO), self._size[1])
        grid = (triton.cdiv(len(dy_RO), BLOCK_R), triton.cdiv(self._size[1], self._group or ROW_BLOCK_I))
        self._run(_gradient_kernel, grid, dy_RO, out)
        return out

    def _run(self, kernel: triton.JITFunction, grid: tuple[int, int], given: Tensor, out: Tensor) -> None:
        given = given if given.stride(-1) == 1 else given.contiguous()
        # A kernel without zero points never reads it.
        zero = self._scale if self._zero is None else self._zero
        groups = 1 if self._group is None else self._scale.shape[1]
        kernel[grid](
            given, self._codes, self._scale, zero, out, len(given), *self._size, groups,
            given.stride(0), self._codes.stride(0),
            BITS=self._bits, GROUPED=self._group is not None, HAS_ZERO=self._zero is not None,
            WIDE=not isinstance(kernel, triton.JITFunction),
            BLOCK_R=BLOCK_R, BLOCK_O=BLOCK_O, BLOCK_I=self._group or ROW_BLOCK_I,
        )  # fmt: skip
