"""Calibrated rounding changes outputs less than rounding each weight alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glmtune.errors import ShapeError
from glmtune.quantization.arithmetic.gptq import output_signal_and_noise, quantize_gptq
from glmtune.quantization.arithmetic.primitives import dequantize, quantize_groups, sqnr_db


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    mixing *= 0.9 ** torch.arange(columns)[:, None]  # a few directions carry most of the energy
    return torch.randn(rows, columns, generator=generator) @ mixing


@pytest.mark.parametrize(("group_size", "symmetric"), [(None, True), (32, True), (32, False), (50, True)])
def test_outputs_change_less(group_size: int | None, symmetric: bool) -> None:
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(5)) * 0.02
    x = correlated(600, 160)
    moments = x.T @ x
    before = weight.clone(), moments.clone()
    plain = quantize_groups(weight, bits=4, group_size=group_size, symmetric=symmetric)
    gptq = quantize_gptq(weight, moments, bits=4, group_size=group_size, symmetric=symmetric)
    assert torch.equal(weight, before[0])
    assert torch.equal(moments, before[1])
    assert gptq.scale.shape == plain.scale.shape
    assert (gptq.zero is None) == symmetric
    assert gptq.codes_OI.min() >= -8
    assert gptq.codes_OI.max() <= 7
    quality = [
        sqnr_db(*output_signal_and_noise(weight, dequantize(found), moments)) for found in (plain, gptq)
    ]
    assert quality[1] > quality[0] + 2
    signal = float((x @ weight.T).square().sum())
    assert output_signal_and_noise(weight, weight, moments)[0] == pytest.approx(signal, rel=1e-4)


def test_uncorrelated_inputs_leave_nothing_to_make_good() -> None:
    weight = torch.randn(8, 64) * 0.02
    gptq = quantize_gptq(weight, torch.eye(64), bits=4)
    assert torch.equal(gptq.codes_OI, quantize_groups(weight, bits=4, group_size=None).codes_OI)


def test_inputs_that_never_occur_are_no_problem() -> None:
    x = correlated(40, 64)
    x[:, 10:20] = 0
    for moments in (x.T @ x, torch.zeros(64, 64)):
        found = dequantize(quantize_gptq(torch.randn(8, 64), moments, bits=4, group_size=16))
        assert torch.isfinite(found).all()
    with pytest.raises(ShapeError, match=r"moments are \[64, 64\], but a weight of 32 input columns"):
        quantize_gptq(torch.randn(8, 32), torch.eye(64), bits=4)
