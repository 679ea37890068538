"""Products with inputs as they are: by digits in bytes or by bfloat16 pairs, which of them a processor decides."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.kernels import native, packed
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels.library_cache import cached_library
from glmtune.quantization.kernels.native import LESSER, SWITCH, NativeLibrary, native_library
from glmtune.quantization.layers.linear import QuantizedLinear

COLUMNS = 712
"""Two blocks of 256 columns and a part of one, no multiple of a step's 8."""


WITHOUT_VNNI = "-mno-avx512vnni"


@pytest.fixture(params=["1", *LESSER, WITHOUT_VNNI])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeLibrary]:
    """What this processor has and what lesser ones have; without VNNI it multiplies pairs of bfloat16."""
    lacks_vnni = request.param == WITHOUT_VNNI
    monkeypatch.setenv(SWITCH, "1" if lacks_vnni else request.param)
    native_library.cache_clear()
    try:
        found = native_library()
        if found.refusal:
            pytest.skip(f"no native kernels: {found.refusal}")
        if lacks_vnni:
            command = ["g++", *native.FLAGS, "-march=native", WITHOUT_VNNI]
            sources = sorted(native.SOURCES.glob("*.cpp"))
            content = b"".join(file.read_bytes() for file in sorted(native.SOURCES.iterdir()))
            path = cached_library(command, sources, b"without VNNI" + content)
            found = native._described(ctypes.CDLL(str(path)), matrix_unit=False)
            monkeypatch.setattr(packed, "native_library", lambda: found)
        yield found
    finally:
        native_library.cache_clear()


def layer(method: str) -> QuantizedLinear:
    chosen = METHODS[method]
    columns = COLUMNS - COLUMNS % (METHODS[method].layout(method).group_size or 1)
    made = QuantizedLinear(columns, 72, layout=chosen.layout(method))
    made.put(chosen.quantize(torch.randn(72, columns, generator=torch.Generator().manual_seed(3)) * 0.05))
    return made


def relative_error(found: Tensor, exact: Tensor, terms: Tensor) -> float:
    """Largest error, of the sum of the magnitudes that were added."""
    return float(((found.double() - exact).abs() / terms).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["int8", "int4", "int4-g32", "int4-g64-asym"])
def test_sums_are_those_of_float32(library: NativeLibrary, method: str, dtype: torch.dtype) -> None:
    made = layer(method)
    weight = made.dequantized(torch.float64)
    prepare_for_inference(made, dtype)
    product = made.product
    assert product is not None
    torch.manual_seed(4)
    for rows in (1, 2, 5, 13):
        x = torch.randn(rows, made.in_features).to(dtype)
        x[:, 7] *= 500  # activations of language models have such columns
        exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        output_rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}[dtype]
        found = product.multiply(x)
        assert found is not None
        assert relative_error(found, exact, terms) <= output_rounding + 1.5e-6


def test_bfloat16_products_are_exact_to_the_last_bit_of_float32(library: NativeLibrary) -> None:
    """Small integers add up without rounding, so any loss in a digit or a pair would show."""
    made = layer("int4")
    codes, scale = made.quantized().codes_OI.double(), made.weight_scale.float().clone()
    prepare_for_inference(made, torch.float32)
    assert made.product is not None
    x = torch.randint(-255, 256, (4, COLUMNS)).float()
    found = made.product.multiply(x)
    assert found is not None
    expected = (x.double() @ codes.T).float() * scale
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_none_makes_its_row_none(
    library: NativeLibrary, value: float, rounded: bool
) -> None:
    if rounded and not library.rounds_activations:
        pytest.skip("compiled without VNNI")
    made = layer("int4")
    prepare_for_inference(made, torch.bfloat16, activations="int8" if rounded else None)
    assert made.product is not None
    x = torch.randn(3, COLUMNS).bfloat16()
    x[1, 300] = value
    found = made.product.multiply(x)
    assert found is not None
    assert found[[0, 2]].isfinite().all()
    assert not found[1].isfinite().any()


def test_zeros_and_the_smallest_numbers(library: NativeLibrary) -> None:
    made = layer("int8")
    weight = made.dequantized(torch.float64)
    prepare_for_inference(made, torch.float32)
    assert made.product is not None
    x = torch.zeros(3, COLUMNS)
    x[1] = torch.randn(COLUMNS) * 1e-30
    x[2] = torch.randn(COLUMNS) * 1e30
    found = made.product.multiply(x)
    assert found is not None
    assert (found[0] == 0).all()
    for row in (1, 2):
        expected = x[row].double() @ weight.T
        assert (found[row].double() - expected).abs().max() <= 2e-6 * expected.abs().max() + 1e-24
