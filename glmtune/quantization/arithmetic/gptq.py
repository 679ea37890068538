"""GPTQ, calibrated rounding: the columns not yet rounded are changed to cancel the errors of those that are.

What counts is the error of the layer's outputs, ‖(W − Q) X‖² = tr((W − Q) H (W − Q)ᵀ) with H = X Xᵀ over
calibration inputs (eq. 1). Where inputs are correlated, an error in one column can be cancelled by small
changes of others. Columns are rounded from left to right::

    columns   0 ........ j-1 | j | j+1 ....... stop-1 | stop ............ I-1
              codes, final   | ↑ |   the same block   |   later blocks
                               |        ↑ changed for every column j       ↑ changed once per block

If column q is rounded and the columns F behind it are still free, the best change of those is (eq. 2)

    δ_F = −(w_q − quant(w_q)) / [H_F⁻¹]_qq · (H_F⁻¹)_{:,q}

with H_F the part of H that belongs to q and F. All rows are rounded in the same order, so all share H_F⁻¹.

Shapes: O output features, I input features, R calibration rows times their tokens.

Source:
    Frantar et al. 2022, arXiv:2210.17323 (GPTQ), algorithm 1 and its equations; scales are those of the
    smallest squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmtune.errors import ShapeError
from glmtune.quantization.arithmetic.primitives import QuantizedTensor, quantize_groups

DAMPING = 0.01
"""Added to the diagonal of H, as a fraction of its mean (the paper's 1 %). With fewer calibration tokens than
columns H is singular, and columns whose inputs were always zero would be given any value at all."""
BLOCK_COLUMNS = 128
"""Columns whose errors are passed on together, as in the paper. A pass over all later columns
for each single column would read and write the whole weight I times; a product of matrices per
block does the same sums (eq. 4)."""


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
        moments_II: second moments of the layer's inputs ``[I, I]``: sum over R of x xᵀ. A common factor
            cancels in eq. 2, so neither the paper's 2 nor the number of rows matters.
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
            # A group's scale is chosen here and not beforehand, as its weights have taken up
            # earlier errors by now (those of this block for the columns up to `stop`: groups that
            # divide the block see all of them).
            if column % width == 0:
                grids.append(_grid(left_OI[:, column : column + width], bits, symmetric))
            codes, rounded = _round(left_OI[:, column], grids[-1], bits)
            codes_OI[:, column] = codes
            # Eq. 2: the diagonal is the root of [H_F⁻¹]_qq and the row behind it (H_F⁻¹)_q,F over that root.
            error = (left_OI[:, column] - rounded) / factor_II[column, column]
            left_OI[:, column:stop] -= error[:, None] * factor_II[column, column:stop]
            errors[:, column - start] = error
        left_OI[:, stop:] -= errors @ factor_II[start:stop, stop:]  # the lazy update of all later blocks
    shape = (rows,) if group_size is None else (rows, len(grids))
    scale = torch.cat([grid.scale for grid in grids], dim=1).reshape(shape)
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return QuantizedTensor(codes_OI, scale, torch.cat(zeros, dim=1) if zeros else None, group_size)


def output_signal_and_noise(
    weight_OI: Tensor, approximation_OI: Tensor, moments_II: Tensor
) -> tuple[float, float]:
    """Return the energies of a layer's outputs and of their change, summed over the calibration inputs.

    Σ_R ‖W x‖² is the trace of W H Wᵀ, so the inputs themselves need not be kept.
    """
    signal, noise = weight_OI.double(), (weight_OI.double() - approximation_OI.double())
    moments = moments_II.double()
    return float(((signal @ moments) * signal).sum()), float(((noise @ moments) * noise).sum())


def _inverse_factor(moments_II: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped moments, float32 ``[I, I]``.

    Taking column after column out of H⁻¹ (eq. 3, a Gaussian elimination) gives the rows that eq. 2
    needs, but rounding errors add up over thousands of columns until the matrix is no longer
    positive definite. Those rows are, up to their scale, the rows of this factor, which is computed
    in a stable way (step 3 of the paper).
    """
    # H has eigenvalues over many orders of magnitude; float32 fails to factor some.
    moments = moments_II.double()
    diagonal = moments.diagonal()
    mean = float(diagonal.mean())
    damped = moments + torch.eye(len(moments), dtype=torch.float64) * (DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _grid(values: Tensor, bits: int, symmetric: bool) -> QuantizedTensor:
    return quantize_groups(values, bits=bits, group_size=values.shape[1], symmetric=symmetric)


def _round(values_O: Tensor, grid: QuantizedTensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a column by its group's scale and zero point; return codes and their values, ``[O]`` each."""
    largest = 2 ** (bits - 1)
    scale = grid.scale[:, 0].float()
    zero = 0.0 if grid.zero is None else grid.zero[:, 0].float()
    codes = ((values_O - zero) / scale).round().clamp(-largest, largest - 1)
    return codes.to(torch.int8), codes * scale + zero
