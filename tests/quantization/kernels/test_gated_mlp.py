"""Gate and up projection as one native product, the gate applied inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Glm4Config, GlmConfig
from transformers.models.glm.modeling_glm import GlmMLP
from transformers.models.glm4.modeling_glm4 import Glm4MLP

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.kernels.dispatch import KERNELS, prepare_for_inference
from glmtune.quantization.kernels.gated_mlp import GatedGlm4MLP, GatedMLP
from glmtune.quantization.kernels.packed import PackedProduct
from glmtune.quantization.layers.linear import QuantizedLinear

pytestmark = pytest.mark.usefixtures("compiled")

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 4.1e-3, torch.float16: 6e-4}
"""Of the largest output: half a unit in the last place."""


def layer(method: str, out_features: int, in_features: int) -> QuantizedLinear:
    chosen = METHODS[method]
    made = QuantizedLinear(in_features, out_features, layout=chosen.layout(method))
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(2)) * 0.05
    made.put(chosen.quantize(weight))
    return made


def mlp(method: str, *, inner: int = 128, act: str = "silu") -> GlmMLP:
    made = GlmMLP(GlmConfig(hidden_size=64, intermediate_size=inner, hidden_act=act))
    made.gate_up_proj = layer(method, 2 * inner, 64)
    made.down_proj = layer(method, 64, inner)
    return made.eval()


def native_product(made: GlmMLP) -> PackedProduct:
    gate_up = made.gate_up_proj
    assert isinstance(gate_up, QuantizedLinear)
    assert gate_up.product is not None
    assert isinstance(gate_up.product.multiply, PackedProduct)
    return gate_up.product.multiply


def assert_gated(found: Tensor, halves: Tensor) -> None:
    gate, up = halves.double().chunk(2, dim=-1)
    exact = nn.functional.silu(gate) * up
    assert (found.double() - exact).abs().max() <= EPSILON[found.dtype] * exact.abs().max()


@pytest.mark.parametrize("activations", list(KERNELS))
@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("method", ["int8", "int4", "int4-g32-asym"])
def test_numbers(method: str, dtype: torch.dtype, activations: str | None) -> None:
    made = mlp(method)
    prepare_for_inference(made, dtype, activations=activations)
    assert type(made) is GatedMLP
    product = native_product(made)
    for rows in (1, 6, 7, 50):
        x = 3 * torch.randn(rows, 64).to(dtype)
        gated = product.gated(x)
        assert gated.dtype == dtype
        assert_gated(gated, product(x.float()))
        with torch.no_grad():
            assert torch.equal(made(x[None])[0], made.down_proj(gated))


def test_large_gates_saturate() -> None:
    made = mlp("int8")
    gate_up = made.gate_up_proj
    assert isinstance(gate_up, QuantizedLinear)
    with torch.no_grad():
        gate_up.weight_scale.fill_(1.0)
    prepare_for_inference(made, torch.float32)
    x, product = torch.randn(4, 64) * 100, native_product(made)
    halves = product(x)
    assert halves[:, :128].abs().max() > 1000
    assert_gated(product.gated(x), halves)


def test_the_mlp_of_glm4_is_the_same() -> None:
    expected = mlp("int4")
    made = Glm4MLP(Glm4Config(hidden_size=64, intermediate_size=128))
    made.gate_up_proj, made.down_proj = layer("int4", 256, 64), layer("int4", 64, 128)
    for each in (expected, made.eval()):
        prepare_for_inference(each, torch.float32)
    assert type(made) is GatedGlm4MLP
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(made(x), expected(x))


def test_other_widths_and_gates_are_left_alone() -> None:
    for made in (mlp("int4", inner=96), mlp("int4", act="gelu")):
        prepare_for_inference(made, torch.float32)
        assert type(made) is GlmMLP


def test_training_autocast_and_casts_run_as_ever() -> None:
    made, x = mlp("int4"), torch.randn(3, 64)
    expected = made(x).detach()
    prepare_for_inference(made, torch.float32)
    trained = made(x.requires_grad_())
    trained.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(trained.detach(), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    made.to(torch.bfloat16).float()  # takes the product away
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
