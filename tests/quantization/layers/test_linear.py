"""Layers of codes behave like linear layers with the dequantized weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.kernels.for_training import prepare_for_training
from glmtune.quantization.kernels.native import native_library
from glmtune.quantization.layers.linear import OUTPUTS_AT_ONCE, QuantizedEmbedding, QuantizedLinear

SHAPES = [(1, 2), (7, 10), (33, 96)]


def pair(
    method: str, out_features: int = 33, in_features: int = 96, *, bias: bool = True
) -> tuple[QuantizedLinear, nn.Linear]:
    """A layer of codes, and the ordinary layer with its dequantized weight."""
    torch.manual_seed(1)
    linear = nn.Linear(in_features, out_features, bias=bias)
    chosen = METHODS[method]
    layer = QuantizedLinear(in_features, out_features, layout=chosen.layout(method), bias=linear.bias)
    layer.put(chosen.quantize(linear.weight.detach()))
    linear = copy.deepcopy(linear)
    linear.weight.data = layer.dequantized()
    return layer, linear


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient_of_the_input(method: str, shape: tuple[int, int]) -> None:
    layer, linear = pair(method, *shape)
    inputs = torch.randn(2, 3, shape[1])
    grads = []
    for module in (layer, linear):
        x = inputs.clone().requires_grad_()
        output = module(x)
        (output.square().sum()).backward()
        grads.append((output.detach(), x.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)


def test_gradcheck() -> None:
    layer, _ = pair("int4-g32-asym", 5, 12)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: layer(v), (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_type_of_the_input(dtype: torch.dtype) -> None:
    layer, linear = pair("int4")
    x = torch.randn(4, 96).to(dtype)
    output = layer.to(dtype)(x)
    assert output.dtype == dtype
    expected = linear.to(dtype)(x)
    torch.testing.assert_close(output, expected, atol=4 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


def test_autocast_decides_the_type() -> None:
    layer, linear = pair("int8")
    x = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = layer(x), linear(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, atol=1e-2, rtol=0)  # the bias is rounded apart
    output.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(4, -1), atol=0.05, rtol=0.02)


def test_gradient_checkpointing_under_autocast_gives_the_same_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, _ = pair("int4-g32")
    grads: list[Tensor] = []
    for recomputes in (False, True):
        x = torch.linspace(-1, 1, 192).reshape(2, 96).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = checkpoint(layer, x, use_reentrant=False) if recomputes else layer(x)
        assert isinstance(output, Tensor)
        output.float().square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("method", ["int8", "int4-g32-asym"])
def test_more_outputs_than_are_formed_at_once(method: str, is_native: bool, dtype: torch.dtype) -> None:
    layer, linear = pair(method, 2 * OUTPUTS_AT_ONCE + 70, 96)
    if is_native and not prepare_for_training(layer):
        pytest.skip(f"no native kernels: {native_library().refusal}")
    x = torch.randn(2, 3, 96).to(dtype)
    results = []
    for module in (layer, linear.double()):
        inputs = x.detach().to(dtype if module is layer else torch.float64).clone().requires_grad_()
        output = module(inputs)
        output.sin().sum().backward()
        assert inputs.grad is not None
        results.append((output.detach().double(), inputs.grad.double()))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for found, exact in zip(*results, strict=True):
        assert (found - exact).abs().max() <= tolerance * exact.abs().max()


def test_inputs_need_not_be_contiguous() -> None:
    layer, linear = pair("int4-clip")
    x = torch.randn(96, 5).T
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer(x[::2]), linear(x[::2]))
    torch.testing.assert_close(layer(torch.empty(0, 96)), linear(torch.empty(0, 96)))


@pytest.mark.parametrize("method", ["int8", "int4", "int4-g32-asym"])
def test_casts_keep_codes_and_scales(method: str) -> None:
    layer, _ = pair(method)
    before = {name: value.clone() for name, value in layer.state_dict().items() if name != "bias"}
    for cast in (layer.bfloat16, layer.half, layer.float, layer.double):
        cast()
        assert layer.bias is not None
        for name, value in before.items():
            now = layer.state_dict()[name]
            assert now.dtype == value.dtype
            assert torch.equal(now, value)
    assert layer.bias.dtype == torch.float64
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.dequantized(), layer.dequantized())
    assert not layer.weight.requires_grad
    assert "96, 33, bias=True" in repr(layer)


def test_embeddings_look_rows_up() -> None:
    method = METHODS["int4"]
    weight = torch.randn(20, 8)
    layer = QuantizedEmbedding(20, 8, layout=method.layout("int4"), dtype=torch.float32)
    layer.put(method.quantize(weight))
    ids = torch.tensor([[3, 3, 19], [0, 7, 1]])
    assert torch.equal(layer(ids), layer.dequantized()[ids])
    layer.bfloat16()
    assert layer(ids).dtype == torch.bfloat16
    assert layer.weight_scale.dtype == torch.float16
    assert "20, 8, 4 bits" in repr(layer)
