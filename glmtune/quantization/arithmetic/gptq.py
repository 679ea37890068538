"""Calibrated rounding: each column's rounding error is made good by the columns that follow.

Shapes: O output features, I input features, R calibration rows times their tokens.

Source:
    Frantar et al. 2022, arXiv:2210.17323 (GPTQ), algorithm 1; scales are those of the smallest
    squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmtune.errors import ShapeError
from glmtune.quantization.arithmetic.primitives import QuantizedTensor, quantize_groups

DAMPING = 0.01
"""Added to the diagonal, as a fraction of its mean."""
BLOCK_COLUMNS = 128
"""Columns whose errors are passed on together."""


def quantize_gptq(
    weight_OI: Tensor,
    moments_II: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
) -> QuantizedTensor:
    """Quantize a weight so that its outputs, not its entries, change least.

    Args:
        weight_OI: float ``[O, I]``.
        moments_II: second moments of the layer's inputs ``[I, I]``: sum over R of x xᵀ, any scale.
        bits: 4 or 8.
        group_size: columns that share a scale; None: the row.
        symmetric: no zero points.

    Returns:
        Codes, scales and zero points in the form of `quantize_groups`.

    Raises:
        ShapeError: the moments belong to another width.
    """
    rows, columns = weight_OI.shape
    if moments_II.shape != (columns, columns):
        raise ShapeError(
            f"The moments are {list(moments_II.shape)}, but a weight of {columns} input columns needs "
            f"[{columns}, {columns}]. Collect them at the input of this layer."
        )
    left_OI = weight_OI.float().clone()
    factor_II = _inverse_factor(moments_II)
    codes_OI = torch.empty(rows, columns, dtype=torch.int8)
    width = group_size or columns
    grids: list[QuantizedTensor] = []
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        errors = torch.zeros(rows, stop - start)
        for column in range(start, stop):
            if column % width == 0:  # a group's grid is chosen when its weights have taken up earlier errors
                grids.append(_grid(left_OI[:, column : column + width], bits, symmetric))
            codes, rounded = _round(left_OI[:, column], grids[-1], bits)
            codes_OI[:, column] = codes
            error = (left_OI[:, column] - rounded) / factor_II[column, column]
            left_OI[:, column:stop] -= error[:, None] * factor_II[column, column:stop]
            errors[:, column - start] = error
        left_OI[:, stop:] -= errors @ factor_II[start:stop, stop:]
    shape = (rows,) if group_size is None else (rows, len(grids))
    scale = torch.cat([grid.scale for grid in grids], dim=1).reshape(shape)
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return QuantizedTensor(codes_OI, scale, torch.cat(zeros, dim=1) if zeros else None, group_size)


def output_signal_and_noise(
    weight_OI: Tensor, approximation_OI: Tensor, moments_II: Tensor
) -> tuple[float, float]:
    """Return the energies of a layer's outputs and of their change, summed over the calibration inputs."""
    signal, noise = weight_OI.double(), (weight_OI.double() - approximation_OI.double())
    moments = moments_II.double()
    return float(((signal @ moments) * signal).sum()), float(((noise @ moments) * noise).sum())


def _inverse_factor(moments_II: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped moments."""
    moments = moments_II.double()
    diagonal = moments.diagonal()
    mean = float(diagonal.mean())
    damped = moments + torch.eye(len(moments), dtype=torch.float64) * (DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _grid(values: Tensor, bits: int, symmetric: bool) -> QuantizedTensor:
    return quantize_groups(values, bits=bits, group_size=values.shape[1], symmetric=symmetric)


def _round(values_O: Tensor, grid: QuantizedTensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a column to its grid; return codes and what they stand for."""
    largest = 2 ** (bits - 1)
    scale = grid.scale[:, 0].float()
    zero = 0.0 if grid.zero is None else grid.zero[:, 0].float()
    codes = ((values_O - zero) / scale).round().clamp(-largest, largest - 1)
    return codes.to(torch.int8), codes * scale + zero
