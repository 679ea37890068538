"""Codes, scales and packing: what holds for every weight."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

from glmtune.errors import ShapeError
from glmtune.quantization.arithmetic import packing, primitives
from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.arithmetic.packing import pack, unpack
from glmtune.quantization.arithmetic.primitives import (
    dequantize,
    quantize_groups,
    quantize_rows,
    signal_and_noise,
    sqnr_db,
)


def weight(rows: int = 24, columns: int = 96, *, heavy: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return normal * normal.abs() ** (1.5 if heavy else 0) * 0.02


def loss_db(method: str, values: Tensor) -> float:
    return sqnr_db(*signal_and_noise(values, dequantize(METHODS[method].quantize(values))))


@pytest.mark.parametrize("module", [primitives, packing])
def test_examples_in_docstrings(module) -> None:
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (7, 64)])
def test_unpacking_inverts_packing(bits: int, shape: tuple[int, int]) -> None:
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, shape, dtype=torch.int8)
    packed = pack(codes, bits=bits)
    assert packed.dtype == torch.int8
    assert packed.shape == (shape[0], shape[1] * bits // 8)
    assert torch.equal(unpack(packed, bits=bits), codes)


def test_an_odd_width_cannot_be_packed_in_4_bits() -> None:
    with pytest.raises(ShapeError, match=r"7 columns, but 4 bits need an even number.*`skip`"):
        pack(torch.zeros(3, 7, dtype=torch.int8), bits=4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_official_rows_are_off_by_at_most_half_a_step(bits: int, dtype: torch.dtype) -> None:
    values = weight().to(dtype)
    before = values.clone()
    quantized = quantize_rows(values, bits=bits)
    assert torch.equal(values, before)
    error = (dequantize(quantized) - values.float()).abs()
    assert (error <= quantized.scale.float()[:, None] * 0.54).all()  # the release divides in float16
    assert quantized.codes_OI.abs().max() == 2 ** (bits - 1) - 1
    assert quantized.scale.dtype == torch.float16


def test_rows_of_zeros_have_codes_of_zero() -> None:
    values = weight(4, 8)
    values[1] = 0
    values[2] = 1e-12  # too small for a float16 scale
    for quantized in (
        quantize_rows(values, bits=4),
        quantize_groups(values, bits=4, group_size=4),
        quantize_groups(values, bits=4, group_size=4, symmetric=False),
    ):
        assert torch.isfinite(quantized.scale).all()
        found = dequantize(quantized)
        assert found[1].abs().max() == 0
        assert found[2].abs().max() < 1e-6


def test_only_matrices_are_quantized() -> None:
    for quantize in (lambda w: quantize_rows(w, bits=8), lambda w: quantize_groups(w, bits=8, group_size=4)):
        with pytest.raises(ShapeError, match=r"\[out, in\].*\[2, 3, 4\]"):
            quantize(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("columns", [96, 100, 31, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_last_group_may_be_short(columns: int, symmetric: bool) -> None:
    values = weight(5, columns)
    quantized = quantize_groups(values, bits=4, group_size=32, symmetric=symmetric)
    groups = math.ceil(columns / 32)
    assert quantized.codes_OI.shape == (5, columns)
    assert quantized.scale.shape == (5, groups)
    assert (quantized.zero is None) == symmetric
    whole = columns // 32 * 32
    if whole:  # full groups do not see the short one
        alone = quantize_groups(values[:, :whole], bits=4, group_size=32, symmetric=symmetric)
        assert torch.equal(alone.codes_OI, quantized.codes_OI[:, :whole])
    assert sqnr_db(*signal_and_noise(values, dequantize(quantized))) > 15


def test_the_range_decides_no_code_outside_4_bits() -> None:
    for name, method in METHODS.items():
        codes = method.quantize(weight(heavy=True)).codes_OI
        largest = 2 ** (method.bits - 1)
        assert codes.min() >= -largest, name
        assert codes.max() <= largest - 1, name


@pytest.mark.parametrize("heavy", [False, True])
def test_better_methods_lose_less(heavy: bool) -> None:
    values = weight(64, 1024, heavy=heavy)
    lost = {name: loss_db(name, values) for name in METHODS}
    assert lost["int8"] > 25
    assert lost["int4-clip"] > lost["int4"] + 2
    assert lost["int4-g128"] > lost["int4-clip"]
    for size in (128, 64, 32):
        assert lost[f"int4-g{size}-asym"] > lost[f"int4-g{size}"]
    assert lost["int4-g32"] > lost["int4-g64"] > lost["int4-g128"]


def test_a_search_never_loses_to_the_plain_range() -> None:
    for seed in range(5):
        values = weight(16, 64, heavy=bool(seed % 2), seed=seed)
        for symmetric in (True, False):
            plain, best = (
                dequantize(quantize_groups(values, bits=4, group_size=16, symmetric=symmetric, search=search))
                for search in (False, True)
            )
            assert ((best - values) ** 2).sum() <= ((plain - values) ** 2).sum()


def test_bits_per_weight_count_scales() -> None:
    assert METHODS["int4"].bits_per_weight(4096) == 4 + 16 / 4096
    assert METHODS["int4-g128"].bits_per_weight(4096) == 4 + 16 / 128
    assert METHODS["int4-g128-asym"].bits_per_weight(4096) == 4 + 32 / 128
    assert METHODS["int4-g64"].bits_per_weight(96) == 4 + 2 * 16 / 96
    for method in METHODS.values():  # what is stated is what is stored
        quantized = method.quantize(weight(8, 96))
        stored = [pack(quantized.codes_OI, bits=method.bits), quantized.scale]
        stored += [] if quantized.zero is None else [quantized.zero]
        assert 8 * sum(tensor.nbytes for tensor in stored) / (8 * 96) == method.bits_per_weight(96)


def test_sqnr() -> None:
    values = torch.tensor([3.0, 4.0])
    assert signal_and_noise(values, torch.tensor([3.0, 3.5])) == (25.0, 0.25)
    assert sqnr_db(25.0, 0.25) == 20.0
    assert sqnr_db(1.0, 0.0) == math.inf


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_dequantized_in_chunks_as_at_once(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtune.quantization.arithmetic import chunking

    chosen = METHODS[method]
    quantized = chosen.quantize(torch.randn(37, 96))
    monkeypatch.setattr(chunking, "CHUNK_WEIGHTS", 480)  # 5 rows, so that the last chunk is a small one
    packed = pack(quantized.codes_OI, bits=chosen.bits)
    found = chunking.dequantize_packed(
        packed, quantized.scale, quantized.zero, bits=chosen.bits, group_size=chosen.group_size, dtype=dtype
    )
    assert torch.equal(found, dequantize(quantized, dtype))
    assert found.dtype == dtype
