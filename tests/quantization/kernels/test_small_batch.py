"""The compiled product of unquantized layers for few rows, and when PyTorch's runs instead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from glmtune.quantization.kernels import small_batch
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels.native import NativeLibrary
from glmtune.quantization.kernels.small_batch import MAX_ROWS, SmallBatchLinear, use_small_batch_products

pytestmark = pytest.mark.usefixtures("compiled")


def changed(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(3)
    layer = nn.Linear(inputs, outputs, bias=bias).bfloat16()
    assert use_small_batch_products(layer) == 1
    assert use_small_batch_products(layer) == 0  # only once
    return layer


def calls_of_parent(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    plain = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: calls.append(len(x)) or plain(x, *rest))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 16), (33, 7), (1, 1), (31, 4), (320, 130)])
def test_few_rows_are_exact_but_for_rounding(
    shape: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = changed(*shape, bias=bias)
    calls = calls_of_parent(layer, monkeypatch)
    for rows in range(1, MAX_ROWS + 1):
        x = torch.randn(rows, shape[0]).bfloat16()
        with torch.no_grad():
            found = layer(x[None])[0]
            inputs = (x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        assert not calls
        exact = nn.functional.linear(*inputs)
        calls.clear()
        assert (found - exact).abs().max() <= 4.1e-3 * exact.abs().max() + 1e-6


def test_inputs_need_not_be_contiguous() -> None:
    layer = changed(64, 16)
    x = torch.randn(3, 128).bfloat16()[:, ::2]
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.contiguous()))
        assert layer(x[:0]).shape == (0, 16)


def test_what_it_does_not_take_is_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = changed(64, 16)
    calls = calls_of_parent(layer, monkeypatch)
    many = torch.randn(MAX_ROWS + 1, 64).bfloat16()
    with torch.no_grad():
        layer(many)
        assert calls.pop() == MAX_ROWS + 1
        with torch.autocast("cpu", torch.bfloat16):
            layer(many[:1])
        assert calls.pop() == 1
        layer.float()(many[:2].float())
        assert calls.pop() == 2
    layer.bfloat16()(many[:3]).sum().backward()
    assert calls.pop() == 3
    assert layer.weight.grad is not None


def test_copies_and_states_are_those_of_a_linear_layer() -> None:
    layer = changed(64, 16, bias=True)
    twin = copy.deepcopy(layer)
    assert isinstance(twin, SmallBatchLinear)
    assert list(twin.state_dict()) == ["weight", "bias"]


def test_models_in_bfloat16_get_it_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    small, wide = nn.Sequential(nn.Linear(8, 8)).bfloat16(), nn.Sequential(nn.Linear(8, 8))
    prepare_for_inference(small, torch.bfloat16)
    prepare_for_inference(wide, torch.float32)
    assert [type(model[0]) for model in (small, wide)] == [SmallBatchLinear, nn.Linear]
    monkeypatch.setattr(small_batch, "native_library", lambda: NativeLibrary(None, "none here"))
    assert use_small_batch_products(wide) == 0
