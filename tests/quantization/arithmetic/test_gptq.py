"""Calibrated rounding changes outputs less than rounding each weight alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glmtune.errors import ConfigError, ShapeError
from glmtune.loading import load_base
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.reading import save_official
from glmtune.quantization.arithmetic.gptq import output_signal_and_noise, quantize_gptq
from glmtune.quantization.arithmetic.primitives import dequantize, quantize_groups, sqnr_db
from glmtune.quantization.layers.apply import quantize_model
from glmtune.quantization.layers.calibrate import quantize_calibrated


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


def rows_for(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, 40, (12, 14), generator=generator)
    if hasattr(model.config, "gmask_token_id"):
        rows[:, 8:10] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    return rows.tolist()


def test_a_model_is_calibrated_block_by_block(source: Path, tmp_path: Path) -> None:
    plain = load_base(source, dtype="float32", device="cpu")
    rows, errors, told = rows_for(plain), {}, []
    expected = [plain(input_ids=torch.tensor([row])).logits for row in rows]
    for method in ("int4-clip", "int4-gptq"):
        model = load_base(source, dtype="float32", device="cpu")
        if method == "int4-gptq":
            report = quantize_calibrated(model, method, rows, watch=lambda *done: told.append(done))
            assert report.measured == "outputs"
            assert all(layer.sqnr_db and layer.sqnr_db > 10 for layer in report.layers if layer.replaced)
        else:
            quantize_model(model, method)
        found = [model(input_ids=torch.tensor([row])).logits for row in rows]
        errors[method] = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    assert errors["int4-gptq"] < errors["int4-clip"]
    assert told == [(1, 2), (2, 2)]
    layout = QuantizedLayout.of(model.config)
    assert layout is not None
    assert layout.is_official  # the released code reads it
    save_official(model, tmp_path)
    again = load_base(tmp_path, dtype="float32", device="cpu", quantization="int4-gptq")
    assert torch.equal(again(input_ids=torch.tensor([rows[0]])).logits, found[0])


def test_what_calibration_needs(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"`int4-gptq`, which needs rows .*glmtune quantize quantization="):
        load_base(source, device="cpu", quantization="int4-gptq")
    model = load_base(source, device="cpu")
    with pytest.raises(ConfigError, match="needs rows to calibrate with, but there are none"):
        quantize_calibrated(model, "int4-gptq", [])
    quantize_model(model, "int4")
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_calibrated(model, "int4-gptq", [[5, 6]])
