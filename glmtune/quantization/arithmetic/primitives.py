"""Arithmetic of weight quantization: floating point weights to integer codes and back, as pure functions.

A weight is ``code * scale + zero``: a scale (and a zero point, in units of the weight) belongs to a row, or
to a group of neighbouring columns in a row. Codes of b bits lie in −2^(b−1) .. 2^(b−1) − 1.

Shapes: O output features (rows), I input features (columns), G groups of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glmtune.errors import ShapeError

SCALE_DTYPE = torch.float16
"""Type of scales and zero points, on disk and in memory."""
CHUNK_WEIGHTS = 2**18
"""Weights worked on at once on a CPU: 1 MiB in float32, so that they and their intermediate
results stay in its cache. Measured for 2,048 x 4,096 weights (int4-g64, one thread): 2^16
0.70 s, 2^18 0.47 s, 2^20 0.84 s."""
CLIP_STEPS, CLIP_FACTOR = 14, 0.9
"""Ranges tried by a search: the largest magnitude times 0.9 to the power of 0, 1, ... 13 (0.25). A row of
4,096 weights with heavy tails is best clipped to less than half of its range: with 7 steps (down to 0.53) it
loses 0.14 dB; with 40 it gains less than 0.01."""
REFINEMENTS = 2
"""Times a search fits scale (and zero point) to the codes by least squares and rounds again. On normal
weights in groups of 64 with zero points: none 21.1 dB, one 21.3, two 21.4, three 21.5; each costs about as
much as two ranges."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as codes.

    Attributes:
        codes_OI: int8 ``[O, I]``.
        scale: float16, weight units per code: ``[O]``, or ``[O, G]`` with groups.
        zero: float16 ``[O, G]``, weight units; None: 0.
        group_size: columns that share a scale, the last group may have fewer; None: the whole row.
    """

    codes_OI: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group_size: int | None = None


def quantize_rows(weight_OI: Tensor, *, bits: int) -> QuantizedTensor:
    """Quantize as the released code does: one scale per row, the largest magnitude becomes the largest code.

    Args:
        weight_OI: float ``[O, I]``; the division is made in its own dtype, as in the release.
        bits: 4 or 8.

    Returns:
        Codes from −(2^(bits−1) − 1) to 2^(bits−1) − 1, scales ``[O]``. A row of zeros (or of numbers too
        small for a float16 scale) has codes 0 and scale 1, where the release divides zero by zero.

    Raises:
        ShapeError: not a matrix.

    Source:
        ``quantization.py`` of THUDM/chatglm-6b, class ``QuantizedLinear``.

    >>> quantized = quantize_rows(torch.tensor([[7.0, -3.4, 0.0, 1.6]]), bits=4)
    >>> quantized.codes_OI.tolist(), quantized.scale.tolist()
    ([[7, -3, 0, 2]], [1.0])
    """
    _check_matrix(weight_OI)
    largest = 2 ** (bits - 1) - 1
    # To float16 before the division: codes belong to the scale that is stored, as in the release.
    scale_O = (weight_OI.abs().amax(dim=-1) / largest).to(SCALE_DTYPE)
    scale_O = torch.where(scale_O == 0, torch.ones_like(scale_O), scale_O)
    codes_OI = torch.round(weight_OI / scale_O[:, None]).clamp(-largest - 1, largest).to(torch.int8)
    return QuantizedTensor(codes_OI, scale_O)


def quantize_groups(
    weight_OI: Tensor, *, bits: int, group_size: int | None, symmetric: bool = True, search: bool = True
) -> QuantizedTensor:
    """Quantize with one scale per group of columns, the range chosen for the smallest squared error.

    Args:
        weight_OI: float ``[O, I]``, any float dtype; computed in float32.
        bits: 4 or 8.
        group_size: columns sharing a scale, the last group may have fewer; None: the row, scales are ``[O]``.
        symmetric: without zero point; otherwise the grid lies between smallest and largest weight.
        search: try smaller ranges than that of the data (large weights are clipped) and fit the scales by
            least squares; False takes the range of the data.

    Returns:
        Codes, scales and, unless symmetric, zero points.

    Raises:
        ShapeError: not a matrix.
    """
    _check_matrix(weight_OI)
    rows, columns = weight_OI.shape
    width = columns if group_size is None else group_size
    groups = -(-columns // width)
    padded = torch.nn.functional.pad(weight_OI.float(), (0, groups * width - columns))
    if groups * width > columns:  # repeat the last weight: zeros would pull the range of an asymmetric group
        padded[:, columns:] = weight_OI[:, -1:].float()
    values_GW = padded.reshape(rows * groups, width)
    codes, scale, zero = _search(values_GW, bits, symmetric=symmetric, search=search)
    shape = (rows,) if group_size is None else (rows, groups)
    return QuantizedTensor(
        codes.reshape(rows, groups * width)[:, :columns].contiguous(),
        scale.reshape(shape).to(SCALE_DTYPE),
        None if zero is None else zero.reshape(shape).to(SCALE_DTYPE),
        group_size,
    )


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight behind codes.

    Args:
        quantized: codes with scales.
        dtype: of the result; the product is formed in float32 and rounded once.

    Returns:
        ``[O, I]``.
    """
    codes_OI = quantized.codes_OI
    columns = codes_OI.shape[1]
    weight_OI = codes_OI.float().mul_(_spread(quantized.scale, quantized.group_size, columns))
    if quantized.zero is not None:
        weight_OI.add_(_spread(quantized.zero, quantized.group_size, columns))
    return weight_OI.to(dtype)


def round_activations(x: Tensor, *, block: int) -> Tensor:
    """Return activations as they are after rounding to INT8 codes, one scale per block of columns.

    Args:
        x: float ``[..., I]``.
        block: columns that share a scale, the last block may have fewer.

    Returns:
        The same shape and type: ``code * scale``, scale the largest magnitude of the block over 127.
    """
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    # A product with 127 / largest, not a division by the scale: the compiled kernel (`round_row` in csrc)
    # does the same, and the two must round alike.
    largest = padded.abs().amax(-1, keepdim=True)
    per_unit = torch.where(largest > 0, torch.full_like(largest, 127) / largest, torch.zeros_like(largest))
    rounded = (padded * per_unit).round_() * (largest / 127)
    return rounded.flatten(-2)[..., :columns].to(x.dtype)


def signal_and_noise(weight: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Return the energies whose ratio is the SQNR: sums of squares of the weight and of the difference."""
    weight = weight.double()
    return float(weight.square().sum()), float((weight - approximation.double()).square().sum())


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal to quantization noise ratio in dB; infinite without noise.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


@dataclass(slots=True)
class _Search:
    """Rows of values, and the grid of the smallest squared error found for each so far."""

    values_GW: Tensor
    bottom: int
    top: int
    scale: Tensor
    zero: Tensor | None
    error: Tensor

    def codes(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Round to a grid; return the codes (float32) and the squared error of each row."""
        shifted = self.values_GW if zero is None else self.values_GW - zero
        codes_GW = (shifted / scale).round_().clamp_(self.bottom, self.top)
        return codes_GW, (codes_GW * scale).sub_(shifted).square_().sum(1, keepdim=True)

    def offer(self, scale: Tensor, zero: Tensor | None) -> None:
        """Take a grid for the rows where it is better."""
        error = self.codes(scale, zero)[1]
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)


def _search(
    values_GW: Tensor, bits: int, *, symmetric: bool, search: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes int8 ``[G, W]``, scales and zero points ``[G, 1]`` of the smallest squared error.

    With the full range the largest weight decides the step of its whole group, mostly rounding error:

        range 1.0   |--|--|--|--|--|--|--|--|      every weight is off by up to half a wide step
        range 0.6      |-|-|-|-|-|-|-|-|           two are clipped and off by more, all others by less

    First the ranges are tried one after the other. From the best one on, two steps alternate, each
    of which cannot raise the error: for given codes, scale and zero point follow in closed form
    (least squares); for given scale and zero point, the nearest code is the best (Lloyd's
    algorithm with an evenly spaced codebook).
    """
    top = 2 ** (bits - 1) - 1
    low, high = values_GW.amin(1, keepdim=True), values_GW.amax(1, keepdim=True)
    # Symmetric: the code -top - 1 is spare and used only where a smaller step lets a weight round to it.
    span = torch.maximum(high, -low) / top if symmetric else (high - low) / (2 * top + 1)

    def grid(ratio: float) -> tuple[Tensor, Tensor | None]:
        scale = _storable(span * ratio)
        # Codes -8 .. 7 are centred at -1/2: half a step upwards makes the grid symmetric about the middle.
        return scale, None if symmetric else _rounded_to_stored((low + high + scale) / 2)

    found = _Search(values_GW, -top - 1, top, *grid(1.0), torch.full_like(low, math.inf))
    if search:
        for step in range(CLIP_STEPS):
            found.offer(*grid(CLIP_FACTOR**step))
        fit = _fit_symmetric if symmetric else _fit_affine
        for _ in range(REFINEMENTS):
            found.offer(*fit(values_GW, found.codes(found.scale, found.zero)[0]))
    return found.codes(found.scale, found.zero)[0].to(torch.int8), found.scale, found.zero


def _fit_symmetric(values_GW: Tensor, codes_GW: Tensor) -> tuple[Tensor, None]:
    """Return the scale of the least squared error for given codes: <w, c> / <c, c>."""
    product = (values_GW * codes_GW).sum(1, keepdim=True)
    scale = _storable(product / codes_GW.square().sum(1, keepdim=True).clamp_min(1))
    return scale, None


def _fit_affine(values_GW: Tensor, codes_GW: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of the regression of the weights on given codes."""
    mean_w, mean_c = values_GW.mean(1, keepdim=True), codes_GW.mean(1, keepdim=True)
    centred = codes_GW - mean_c
    slope = (centred * values_GW).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp_min(1e-6)
    scale = _storable(slope)
    return scale, _rounded_to_stored(mean_w - scale * mean_c)


def _storable(scale: Tensor) -> Tensor:
    """Round a scale to its stored type; what would be zero becomes 1 (all codes are 0 then).

    A search compares errors with rounded scales only: float16 is off by up to 1/2048, which may be more than
    what one range gains over the next.
    """
    stored = _rounded_to_stored(scale)
    return torch.where(stored > 0, stored, torch.ones_like(stored))


def _rounded_to_stored(values: Tensor) -> Tensor:
    return values.to(SCALE_DTYPE).float()


def _spread(values: Tensor, group_size: int | None, columns: int) -> Tensor:
    """Repeat the value of a group for each of its columns: ``[O, I]``, or ``[O, 1]`` without groups."""
    if group_size is None:
        return values.float()[:, None]
    return values.float().repeat_interleave(group_size, dim=1)[:, :columns]


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ShapeError(
            f"Only the weight of a linear layer, [out, in], can be quantized, but this one is "
            f"{list(weight.shape)}."
        )
