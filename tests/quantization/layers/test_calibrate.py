"""A model is calibrated block by block, each behind the codes of those before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.errors import ConfigError
from glmtune.loading import load_base
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.writing import save_official
from glmtune.quantization.layers.apply import quantize_model
from glmtune.quantization.layers.calibrate import quantize_calibrated


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
            report = quantize_calibrated(model, method, rows, on_progress=lambda *done: told.append(done))
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
