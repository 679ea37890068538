"""Types of tensors and their blocks: sizes, what rounding costs, and that the `gguf` package reads what we write."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glmtune.errors import CheckpointError, MissingExtraError
from glmtune.export.gguf import types
from glmtune.export.gguf.encoding import CHUNK, decode, encode
from glmtune.export.gguf.types import BLOCKS, FILE_TYPES, gguf_package, num_bytes, tensor_type

gguf = pytest.importorskip("gguf", reason="the `gguf` package is not installed: pip install 'glmtune[gguf]'")

WIDE = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
HEAVY = WIDE.sign() * (WIDE / 0.02).abs().pow(3) * 0.02  # a few values far from the rest
SPIKED = torch.zeros(4, 256).index_fill_(1, torch.tensor([5]), 1.0)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_sizes_are_the_package_s() -> None:
    for name, sizes in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == sizes
    for name, file_type in FILE_TYPES.items():
        usual = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert gguf.LlamaFileType[usual] == file_type.number


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    "weight",
    [WIDE, HEAVY, SPIKED, -WIDE.abs(), WIDE.bfloat16()],
    ids=["wide", "heavy", "spiked", "negative", "bfloat16"],
)
def test_blocks_are_read_as_they_were_written(kind: str, weight: torch.Tensor) -> None:
    content = encode("a", weight, kind)
    assert content.nbytes == num_bytes(tuple(weight.shape), kind)
    found = decode(content, kind, tuple(weight.shape))
    bits = {"F32": 24, "F16": 11, "BF16": 8, "Q8_0": 7.5, "Q6_K": 6, "Q5_0": 5, "Q4_K": 4.4, "Q4_0": 4}[kind]
    # A uniform error of a step's size, of a span that is some multiple of the weights' size.
    assert relative_error(found, weight.float()) < 2.0 ** (1.3 - bits) * (3 if weight is HEAVY else 1)


def test_a_k_quant_loses_less_than_plain_blocks_of_the_same_bits() -> None:
    for weight in (WIDE, HEAVY, WIDE + 0.01):
        errors = {
            kind: relative_error(decode(encode("a", weight, kind), kind, (64, 512)), weight)
            for kind in BLOCKS
        }
        assert errors["Q4_K"] < 0.9 * errors["Q4_0"]
        assert errors["Q6_K"] < 0.6 * errors["Q5_0"]
        assert errors["Q8_0"] < errors["Q6_K"]


def test_weights_on_the_grid_stay_what_they_are() -> None:
    """Codes times a power of two, all codes there: nothing is lost, so codes and packing are right bit by bit."""
    codes = torch.arange(16).repeat(16).view(1, 256)  # each group of 32 holds 0..15 twice
    grid = (codes - 8.0) / 64
    torch.testing.assert_close(decode(encode("a", grid, "Q4_K"), "Q4_K", (1, 256)), grid, atol=2e-4, rtol=0)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    mixed = (torch.arange(256) % 64 - 32.0)[order][None] / 1024
    mixed.view(1, 16, 16)[..., 0] = -32 / 1024  # the largest of every group, so that all have one scale
    torch.testing.assert_close(decode(encode("a", mixed, "Q6_K"), "Q6_K", (1, 256)), mixed, atol=1e-5, rtol=0)


def test_zeros_stay_zeros() -> None:
    for kind in BLOCKS:
        assert not decode(encode("a", torch.zeros(2, 256), kind), kind, (2, 256)).any()


def test_tensors_longer_than_a_chunk_are_the_same_rows() -> None:
    rows = torch.randn(CHUNK * torch.get_num_threads() // 512 + 3, 512)
    whole = encode("a", rows, "Q4_K")
    assert np.array_equal(whole[-3 * 288 :], encode("a", rows[-3:], "Q4_K"))


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight holds numbers that are infinite"):
        encode("blk.0.ffn_up.weight", torch.tensor([[1.0, float("nan")]]), "F16")
    with pytest.raises(CheckpointError, match=r"a holds 7e\+04, but F16 has no numbers above 65504.*BF16"):
        encode("a", torch.full((1, 2), 7e4), "F16")
    assert decode(encode("a", torch.full((1, 2), 7e4), "BF16"), "BF16", (1, 2)).isfinite().all()


def test_types_are_chosen_as_llama_quantize_does() -> None:
    """For GLM-4-9B, counted in files that llama.cpp made; 13696 columns are no whole blocks of 256."""

    def of(name: str, shape: tuple[int, ...], file_type: str, layers: int = 40, tied: bool = False) -> str:
        return tensor_type(name, shape, file_type, num_layers=layers, head_is_tied=tied)

    assert of("output.weight", (151552, 4096), "Q4_K_M") == "Q6_K"
    assert of("output.weight", (151552, 4096), "Q4_0") == "Q6_K"
    assert of("output.weight", (151552, 4096), "Q8_0") == "Q8_0"
    assert of("token_embd.weight", (151552, 4096), "Q4_K_M") == "Q4_K"
    assert of("token_embd.weight", (151552, 4096), "Q4_K_M", tied=True) == "Q6_K"
    assert of("blk.7.attn_qkv.bias", (4608,), "Q4_0") == "F32"
    assert of("blk.7.attn_norm.weight", (4096,), "F16") == "F32"
    qkv = [of(f"blk.{layer}.attn_qkv.weight", (4608, 4096), "Q4_K_M") for layer in range(40)]
    assert [layer for layer, kind in enumerate(qkv) if kind == "Q6_K"] == [
        *range(5), 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, *range(35, 40),
    ]  # fmt: skip
    assert {of(f"blk.{layer}.ffn_down.weight", (4096, 13696), "Q4_K_M") for layer in range(40)} == {
        "Q5_0",
        "Q8_0",
    }
    assert of("blk.0.ffn_down.weight", (32, 48), "Q8_0") == "F16"  # 48 is no multiple of 32


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"`format=gguf` needs.*pip install 'glmtune\[gguf\]'"):
        gguf_package()
    assert types.DEFAULT_TYPE in FILE_TYPES
