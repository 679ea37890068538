r"""Q4_K and Q6_K: blocks of 256 weights, whose groups have scales of their own, which are codes themselves.

A row is cut into blocks, a block into groups::

    Q4_K   8 groups of 32   w = d · s · code - m · t   codes 0..15, s and t 0..63; d, m: float16 of the block
    Q6_K  16 groups of 16   w = d · s · code           codes -32..31, s -128..127; d: float16 of the block

Scales are searched for: around the one that spans the group, some twenty others are tried, each with the best
line through its codes (least squares), and the one with the smallest error stays. Large weights count more.

Shapes: B blocks, G groups of a block, L weights of a group. All in float32, on PyTorch's threads.

Source:
    ``quantize_row_q4_K_ref`` and ``quantize_row_q6_K_ref`` in ``ggml/src/ggml-quants.c`` of llama.cpp: the
    layout of the bytes, what is tried and how it is weighed.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
STEPS_Q4, FIRST_Q4 = 21, -1.0
"""Scales that are tried for Q4_K: the number of levels is taken as 15 - 1.0, 15 - 0.9, ... instead of 15."""
SHIFTS_Q6 = (*range(-9, 0), *range(1, 10))
"""The same for Q6_K in tenths, beside 32 itself."""
TINY = 1e-15
"""Groups whose weights are all smaller are zero."""


def quantize_q4_k(weight_BGL: Tensor) -> Tensor:
    """Round blocks to Q4_K.

    Args:
        weight_BGL: float32 ``[B, 8, 32]``.

    Returns:
        uint8 ``[B, 144]``: d, m, the packed scales and mins (12 bytes), the codes (128 bytes).
    """
    scale_BG, low_BG = _best_lines(weight_BGL)
    d_B, s_BG = _six_bits(scale_BG)
    m_B, t_BG = _six_bits(low_BG)
    step_BG1 = (d_B.float()[:, None] * s_BG)[..., None]
    low_BG1 = (m_B.float()[:, None] * t_BG)[..., None]
    codes_BGL = ((weight_BGL + low_BG1) / step_BG1).round_().clamp_(0, 15)
    codes_BGL = torch.where(step_BG1 == 0, 0, codes_BGL).to(torch.uint8)
    pairs = codes_BGL.view(-1, 4, 2, 32)  # two groups share 32 bytes: low and high half of each
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    return torch.cat([_bytes(d_B), _bytes(m_B), _packed_scales(s_BG, t_BG), packed], dim=1)


def quantize_q6_k(weight_BGL: Tensor) -> Tensor:
    """Round blocks to Q6_K.

    Args:
        weight_BGL: float32 ``[B, 16, 16]``.

    Returns:
        uint8 ``[B, 210]``: low four bits of the codes (128 bytes), their high two bits (64), the scales (16
        signed bytes), d.
    """
    scale_BG = _best_symmetric_scales(weight_BGL)
    largest_B1 = scale_BG.gather(1, scale_BG.abs().argmax(1, keepdim=True))
    is_zero_B1 = largest_B1.abs() < TINY
    inverse_B1 = -128 / torch.where(is_zero_B1, 1, largest_B1)
    d_B = torch.where(is_zero_B1, 0, 1 / inverse_B1).squeeze(1).half()
    s_BG = torch.where(is_zero_B1, 0, (inverse_B1 * scale_BG).round_().clamp_(-128, 127))
    step_BG1 = (d_B.float()[:, None] * s_BG)[..., None]
    codes_BGL = (weight_BGL / step_BG1).round_().clamp_(-32, 31)
    codes = (torch.where(step_BG1 == 0, 0, codes_BGL) + 32).to(torch.uint8).view(-1, 2, 4, 32)
    first, second, third, fourth = (codes[:, :, part] for part in range(4))  # [B, 2, 32] each
    low = torch.cat([first & 15 | (third & 15) << 4, second & 15 | (fourth & 15) << 4], dim=2)
    high = first >> 4 | second >> 4 << 2 | third >> 4 << 4 | fourth >> 4 << 6
    scales = s_BG.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), scales, _bytes(d_B)], dim=1)


def _best_lines(weight_BGL: Tensor) -> tuple[Tensor, Tensor]:
    """Find scale and low end of each group for codes 0..15.

    Returns:
        The scale and what is subtracted, both ``[B, G]`` and not negative.
    """
    importance = weight_BGL.square().mean(2, keepdim=True).sqrt() + weight_BGL.abs()
    total = importance.sum(2)
    total_w = (importance * weight_BGL).sum(2)
    high, low = weight_BGL.amax(2), weight_BGL.amin(2).clamp_(max=0)
    is_flat = high == low
    scale = (high - low) / 15
    best = _error(weight_BGL, _codes(weight_BGL, low, scale.reciprocal()), scale, low, importance)
    for step in range(STEPS_Q4):
        codes = _codes(weight_BGL, low, (FIRST_Q4 + 0.1 * step + 15) / (high - low))
        weighted = importance * codes
        sum_c, sum_cc, sum_cw = (
            weighted.sum(2),
            (weighted * codes).sum(2),
            (weighted * weight_BGL).sum(2),
        )
        determinant = total * sum_cc - sum_c.square()
        new_scale = (total * sum_cw - total_w * sum_c) / determinant
        new_low = (sum_cc * total_w - sum_c * sum_cw) / determinant
        # Only a low end of zero or less can be stored; without one the line goes through zero.
        new_scale = torch.where(new_low > 0, sum_cw / sum_cc, new_scale)
        new_low = new_low.clamp_(max=0)
        error = _error(weight_BGL, codes, new_scale, new_low, importance)
        is_better = (determinant > 0) & (error < best)
        best = torch.where(is_better, error, best)
        scale, low = torch.where(is_better, new_scale, scale), torch.where(is_better, new_low, low)
    return torch.where(is_flat, 0, scale).clamp_(min=0), -low


def _codes(weight_BGL: Tensor, low_BG: Tensor, inverse_BG: Tensor) -> Tensor:
    return ((weight_BGL - low_BG[..., None]) * inverse_BG[..., None]).round_().clamp_(0, 15)


def _error(weight: Tensor, codes: Tensor, scale: Tensor, low: Tensor, importance: Tensor) -> Tensor:
    difference = codes * scale[..., None] + low[..., None] - weight
    return (difference.square_() * importance).sum(2)


def _best_symmetric_scales(weight_BGL: Tensor) -> Tensor:
    """Find the scale of each group for codes -32..31; the largest weight is given the code -32 or so.

    Returns:
        The scales ``[B, G]``, of either sign.
    """
    largest = weight_BGL.gather(2, weight_BGL.abs().argmax(2, keepdim=True)).squeeze(2)
    is_zero = largest.abs() < TINY
    largest = torch.where(is_zero, 1, largest)
    importance = weight_BGL.square()
    scale, best = torch.zeros_like(largest), torch.full_like(largest, -1)
    for shift in (0, *SHIFTS_Q6):
        inverse = -(32 + 0.1 * shift) / largest
        codes = (weight_BGL * inverse[..., None]).round_().clamp_(-32, 31)
        weighted = importance * codes
        sum_cw, sum_cc = (weighted * weight_BGL).sum(2), (weighted * codes).sum(2)
        is_better = (sum_cc > 0) & (sum_cw.square() > best * sum_cc)
        new_scale = sum_cw / sum_cc
        scale = torch.where(is_better, new_scale, scale)
        best = torch.where(is_better, new_scale * sum_cw, best)
    return torch.where(is_zero, 0, scale)


def _six_bits(values_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Round numbers of a block to 0..63 times one float16: that number ``[B]``, and the codes ``[B, G]``."""
    largest = values_BG.amax(1)
    inverse = torch.where(largest > 0, 63 / largest, 0)
    return (largest / 63).half(), (values_BG * inverse[:, None]).round_().clamp_(0, 63)


def _packed_scales(s_BG: Tensor, t_BG: Tensor) -> Tensor:
    """Pack two times eight codes of six bits into twelve bytes.

    The first four of each are whole in a byte; the low halves of the other four are in the last four bytes,
    and their two high bits above those of the first.
    """
    s_BG, t_BG = s_BG.to(torch.uint8), t_BG.to(torch.uint8)
    s_first, s_last, t_first, t_last = s_BG[:, :4], s_BG[:, 4:], t_BG[:, :4], t_BG[:, 4:]
    above = s_first | s_last >> 4 << 6, t_first | t_last >> 4 << 6
    return torch.cat([*above, s_last & 15 | (t_last & 15) << 4], dim=1)


def _bytes(half_B: Tensor) -> Tensor:
    return half_B[:, None].contiguous().view(torch.uint8)
