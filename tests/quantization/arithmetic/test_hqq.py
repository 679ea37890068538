"""HQQ through its library: our format holds exactly what it decides, and it beats the plain range."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from glmtune.errors import ConfigError, ShapeError
from glmtune.quantization.arithmetic.methods import OPTIONAL
from glmtune.quantization.arithmetic.primitives import dequantize, quantize_groups, signal_and_noise, sqnr_db

needs_hqq = pytest.mark.skipif(
    importlib.util.find_spec("hqq") is None, reason="hqq is not installed (pip install hqq)"
)


def heavy(rows: int = 48, columns: int = 128) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return values * values.abs() * 0.02


@needs_hqq
def test_our_format_holds_what_the_library_decides() -> None:
    from hqq.core.quantize import Quantizer

    weight = heavy()
    found = dequantize(OPTIONAL["int4-g64-hqq"].quantize(weight))
    codes, meta = Quantizer.quantize(weight, nbits=4, group_size=64, axis=1, device="cpu")
    expected = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    # Float16 scales.
    torch.testing.assert_close(found, expected, atol=2e-3 * float(weight.abs().max()), rtol=0)


@needs_hqq
def test_it_is_better_than_the_plain_range() -> None:
    weight = heavy()
    plain = quantize_groups(weight, bits=4, group_size=64, symmetric=False, search=False)
    results = [
        sqnr_db(*signal_and_noise(weight, dequantize(quantized)))
        for quantized in (OPTIONAL["int4-g64-hqq"].quantize(weight), plain)
    ]
    assert results[0] > results[1] + 0.1


@needs_hqq
def test_groups_must_divide_the_width() -> None:
    with pytest.raises(ShapeError, match=r"groups of 64 columns must divide.*has 96.*int4-g64-asym"):
        OPTIONAL["int4-g64-hqq"].quantize(torch.ones(4, 96))


@needs_hqq
def test_what_it_wrote_loads_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glmtune.loading import load_base
    from glmtune.quantization.files.write import QuantizeJob, quantize_checkpoint

    written = quantize_checkpoint(QuantizeJob("glm-tiny", "int4-g64-hqq", tmp_path / "out"))
    assert not written.is_official
    monkeypatch.setitem(sys.modules, "hqq", None)
    model = load_base(written.folder, device="cpu")
    assert model.quantization == "int4-g64-hqq"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    monkeypatch.setitem(sys.modules, "hqq", None)
    with pytest.raises(ConfigError, match=r"`int4-g64-hqq`, which needs the package `hqq`.*pip install hqq"):
        OPTIONAL["int4-g64-hqq"].quantize(torch.ones(4, 64))
