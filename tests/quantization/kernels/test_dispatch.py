"""PyTorch's kernels against the plain path, and what runs where none does; ours: test_native.py."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmtune.loading import load_base
from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.kernels import dispatch, int4pack
from glmtune.quantization.kernels.dispatch import (
    Int4Product,
    Int8Product,
    choose_kernel,
    prepare_for_inference,
)
from glmtune.quantization.kernels.int4pack import panel_outputs
from glmtune.quantization.kernels.native import SWITCH, native_library
from glmtune.quantization.layers.compiled import give_number
from glmtune.quantization.layers.linear import QuantizedLinear

DATA_FREE = [name for name, method in METHODS.items() if not method.calibrated]
TOLERANCE = 0.02  # of the largest output: bfloat16 scales and outputs


@pytest.fixture(autouse=True)
def _without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the native kernels out, as where no compiler is."""
    monkeypatch.setenv(SWITCH, "0")
    native_library.cache_clear()
    yield
    native_library.cache_clear()


def layer(method: str, out_features: int = 48, in_features: int = 256) -> QuantizedLinear:
    chosen = METHODS[method]
    made = QuantizedLinear(in_features, out_features, layout=chosen.layout(method))
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(2)) * 0.05
    made.put(chosen.quantize(weight))
    return made


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    difference = (found.float() - expected.float()).abs().max()
    assert difference <= TOLERANCE * expected.float().abs().max()


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 256, 257, 512])
def test_rows_from_one_to_many(method: str, rows: int) -> None:
    made = layer(method)
    x = torch.randn(rows, 256).bfloat16()
    expected = made(x)
    kernel = choose_kernel(made, torch.bfloat16)
    assert kernel is not None
    assert kernel.name == ("int8pack" if method == "int8" else "int4pack")
    made.use(kernel.prepared(made))
    assert_near(made(x), expected)


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("shape", [(16, 32), (33, 64), (48, 96), (7, 10), (1, 2), (64, 320), (24, 160)])
def test_odd_shapes_run_somewhere(method: str, shape: tuple[int, int]) -> None:
    made = layer(method, *shape)
    x = torch.randn(3, 5, shape[1]).bfloat16()
    expected = made(x)
    used = prepare_for_inference(made, torch.bfloat16)
    assert sum(used.values()) == 1
    assert_near(made(x), expected)


@pytest.mark.parametrize("method", ["int8", "int4", "int4-g64-asym"])
def test_inputs_need_not_be_contiguous(method: str) -> None:
    made = layer(method)
    wide = torch.randn(6, 512).bfloat16()
    inputs = (wide[:, ::2], torch.randn(256, 6).bfloat16().T, wide[::2, :256], torch.empty(0, 256).bfloat16())
    expected = [made(x) for x in inputs]
    prepare_for_inference(made, torch.bfloat16)
    for x, right in zip(inputs, expected, strict=True):
        if right.numel():
            assert_near(made(x), right)
        else:
            assert made(x).shape == right.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_run_on_the_plain_path(dtype: torch.dtype) -> None:
    made = layer("int4")
    x = torch.randn(4, 256).to(dtype)
    expected = made(x)
    assert choose_kernel(made, dtype) is None
    prepare_for_inference(made, torch.bfloat16)
    assert made.product is not None
    assert torch.equal(made(x), expected)


@pytest.mark.parametrize("method", ["int8", "int4-g32"])
def test_gradients_are_those_of_the_plain_path(method: str) -> None:
    made = layer(method)
    grads = []
    for _ in range(2):
        x = torch.linspace(-1, 1, 512).reshape(2, 256).bfloat16().requires_grad_()
        made(x).sum().backward()
        grads.append(x.grad)
        prepare_for_inference(made, torch.bfloat16)
    assert torch.equal(*grads)


def test_casts_moves_and_copies_take_the_product_away() -> None:
    made = layer("int4")
    prepare_for_inference(made, torch.bfloat16)
    give_number(made)
    twin = copy.deepcopy(made)
    assert (twin.product, twin.number) == (None, None), "compiled, it would be the other one's product"
    assert made.number is not None
    made.float()
    assert (made.product, made.number) == (None, None)


def test_the_reason_for_the_plain_path_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert prepare_for_inference(layer("int4"), torch.float32) == {"plain": 1}
    assert len(caplog.records) == 1
    assert "inputs are float32, not bfloat16" in caplog.text
    assert "no multiple of 16" in Int4Product().refusal(layer("int4", 33), torch.bfloat16)
    assert "no group size" in Int4Product().refusal(layer("int4", 16, 10), torch.bfloat16)
    assert "no multiple of 16" in Int8Product().refusal(layer("int8", 16, 24), torch.bfloat16)
    assert "not INT8" in Int8Product().refusal(layer("int4"), torch.bfloat16)
    monkeypatch.setattr(dispatch.torch.ops, "aten", object())
    assert "this PyTorch has no _weight_int8pack_mm" in Int8Product().refusal(layer("int8"), torch.bfloat16)


@pytest.mark.parametrize("outputs", [16, 64, 80, 176, 1104])
@pytest.mark.parametrize("method", ["int4", "int4-g64-asym"])
def test_int4_codes_are_held_once_and_come_back(method: str, outputs: int) -> None:
    made = layer(method, outputs)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    x = torch.linspace(-1, 1, 300 * 256).reshape(300, 256).bfloat16()
    grads = []
    for _ in range(2):
        inputs = x.clone().requires_grad_()
        made(inputs).sum().backward()
        grads.append(inputs.grad)
        assert prepare_for_inference(made, torch.bfloat16) == {"int4pack": 1}
    assert made.weight.is_meta == (panel_outputs() is not None)
    assert torch.equal(*grads)
    after = made.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    made.use(None)
    assert torch.equal(made.weight, before["weight"])


def test_another_layout_of_int4_leaves_the_codes_in_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4pack, "packed_int4", lambda codes_OI: codes_OI.flip(0)[:, ::2].to(torch.uint8))
    assert panel_outputs.__wrapped__() is None
    monkeypatch.setattr(dispatch, "panel_outputs", lambda: None)
    made = layer("int4")
    prepare_for_inference(made, torch.bfloat16)
    assert not made.weight.is_meta


@torch.no_grad()
@pytest.mark.parametrize("method", ["int8", "int4", "int4-g64"])
def test_a_whole_model(method: str, tmp_path: Path) -> None:
    model = load_base("glm-tiny", dtype="bfloat16", device="cpu", quantization=method)
    ids = torch.arange(5, 37)[None]
    expected = model(input_ids=ids).logits.float()
    fingerprint = model.fingerprint()
    used = prepare_for_inference(model)
    assert "plain" not in used
    found = model(input_ids=ids).logits.float()
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.fingerprint() == fingerprint
    model.save_pretrained(tmp_path)
    assert load_base(tmp_path, device="cpu").fingerprint() == fingerprint
