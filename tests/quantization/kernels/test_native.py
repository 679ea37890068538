"""The compiled kernels against the plain path in float32, which they equal up to the rounding of the result."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glmtune.errors import ConfigError
from glmtune.loading import load_base
from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.arithmetic.primitives import round_activations
from glmtune.quantization.kernels import packed
from glmtune.quantization.kernels.dispatch import KERNELS, prepare_for_inference
from glmtune.quantization.kernels.fused_projections import FusedProducts, fuse_attention_projections
from glmtune.quantization.kernels.native import native_library
from glmtune.quantization.kernels.packed import ACTIVATION_BLOCK, PackedProduct
from glmtune.quantization.layers.linear import QuantizedLinear

pytestmark = pytest.mark.usefixtures("compiled")

DATA_FREE = [name for name, method in METHODS.items() if not method.calibrated]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 4.1e-3, torch.float16: 6e-4}
"""Of the largest output: half a unit in the last place, and float32 sums in another order."""
SHAPES = [(16, 32), (33, 64), (48, 96), (7, 10), (1, 2), (64, 320), (24, 160), (130, 264)]


def layer(method: str, out_features: int = 72, in_features: int = 256, seed: int = 2) -> QuantizedLinear:
    chosen = METHODS[method]
    made = QuantizedLinear(in_features, out_features, layout=chosen.layout(method))
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05
    made.put(chosen.quantize(weight))
    return made


def assert_equal_but_for_rounding(found: Tensor, exact: Tensor, terms: Tensor | None = None) -> None:
    """Compare; ``terms``, sums of magnitudes, bound what rounding adds where a single sum nearly cancels."""
    assert found.shape == exact.shape
    difference = (found.double() - exact).abs().max()
    size = exact.abs().max() if terms is None else max(exact.abs().max(), terms.max() / 16)
    assert difference <= EPSILON[found.dtype] * size


def takes_matrix_unit(made: QuantizedLinear, x: Tensor) -> bool:
    """Whether a processor with one (AMX) multiplies there, where weights have the type of the input."""
    multiply = None if made.product is None else made.product.multiply
    return isinstance(multiply, PackedProduct) and multiply.prefers_matrices(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", DATA_FREE)
def test_rows_from_one_to_many_in_every_type(method: str, dtype: torch.dtype) -> None:
    made = layer(method)
    weight, rounded_weight = made.dequantized(torch.float64), made.dequantized(dtype).double()
    prepare_for_inference(made, dtype)
    for rows in (1, 2, 3, 5, 6, 7, 8, 64, 257, 512):
        x = torch.randn(rows, 256).to(dtype)
        found = made(x)
        assert found.dtype == dtype
        multiplied = rounded_weight if takes_matrix_unit(made, x) else weight
        assert_equal_but_for_rounding(found, x.double() @ multiplied.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", DATA_FREE)
def test_odd_shapes(method: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        made = layer(method, *shape)
        weight, codes = made.dequantized(torch.float64), made.weight.clone()
        assert prepare_for_inference(made, dtype) == {"native": 1}
        x = torch.randn(3, 5, shape[1]).to(dtype)
        assert_equal_but_for_rounding(made(x), x.double() @ weight.T)
        assert torch.equal(made.stored_codes(), codes)
        assert torch.equal(made.dequantized(torch.float64), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", DATA_FREE)
def test_rounded_activations(method: str, dtype: torch.dtype) -> None:
    if not native_library().rounds_activations:
        pytest.skip("the processor has no AVX-512 VNNI")
    for shape in [*SHAPES, (72, 1000)]:
        made = layer(method, *shape)
        weight, rounded_weight = made.dequantized(torch.float64), made.dequantized(dtype).double()
        assert prepare_for_inference(made, dtype, activations="int8") == {"native-a8": 1}
        for rows in (1, 4, 7, 64):
            x = torch.randn(rows, shape[1]).to(dtype)
            on_matrices = takes_matrix_unit(made, x)
            seen = x if on_matrices else x.float()
            rounded = round_activations(seen, block=made.group_size or ACTIVATION_BLOCK).double()
            multiplied = rounded_weight if on_matrices else weight
            terms = rounded.abs() @ multiplied.abs().T
            assert_equal_but_for_rounding(made(x), rounded @ multiplied.T, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["int8", "int4", "int4-g64"])
def test_activations_are_rounded_as_the_plain_path_rounds_them(method: str, dtype: torch.dtype) -> None:
    """Bit for bit: behind the identity the codes themselves can be seen, halves of a code and tails included."""
    if not native_library().rounds_activations:
        pytest.skip("the processor has no AVX-512 VNNI")
    for width in (32, 256, 320, 1000):
        chosen = METHODS[method]
        if chosen.layout(method).group_size is not None and width % 32:
            continue
        made = QuantizedLinear(width, width, layout=chosen.layout(method))
        quantized = chosen.quantize(torch.eye(width))
        codes_OI = torch.eye(width, dtype=torch.int8)
        made.put(replace(quantized, codes_OI=codes_OI, scale=torch.ones_like(quantized.scale)))
        product = KERNELS["int8"][0].prepared(made).multiply
        block = made.group_size or ACTIVATION_BLOCK
        x = torch.randn(4, width).to(dtype)
        x[1] = torch.arange(width).remainder(255).sub(127) / 2  # half of them lie midway between two codes,
        x[1, ::32] = 127.0  # as a code stands for 1
        x[2, ::3], x[3] = 1000.0, 0.0
        found = product(x)
        assert found is not None
        assert torch.equal(found, round_activations(x.float(), block=block).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_meet_the_largest_activations(bits: int) -> None:
    """Sums of 16 bits, which AVX2 has in between, must not saturate: every code is the lowest or the highest."""
    if not native_library().rounds_activations:
        pytest.skip("the processor has no AVX-512 VNNI")
    made = layer(f"int{bits}", 64, 512)
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes_OI = torch.full((64, 512), highest, dtype=torch.int8)
    codes_OI[::2] = lowest
    codes_OI[1::4, ::2] = lowest
    made.put(replace(made.quantized(), codes_OI=codes_OI, scale=torch.ones(64)))
    product = KERNELS["int8"][0].prepared(made).multiply
    for sign in (1.0, -1.0):
        x = torch.full((7, 512), sign)
        x[3, 1::2] = -sign
        found = product(x)
        assert found is not None
        assert_equal_but_for_rounding(found, x.double() @ codes_OI.double().T)


@pytest.mark.parametrize("activations", list(KERNELS))
@pytest.mark.parametrize("method", ["int8", "int4", "int4-g64-asym"])
def test_a_matrix_unit_computes_the_same(
    method: str, activations: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(method, 200)
    x = torch.randn(70, 256)
    block = made.group_size or ACTIVATION_BLOCK
    seen = x.bfloat16() if activations is None else round_activations(x.bfloat16(), block=block)
    exact = seen.double() @ made.dequantized(torch.bfloat16).double().T
    monkeypatch.setattr(packed, "native_library", lambda: replace(native_library(), matrix_unit=True))
    monkeypatch.setattr(packed, "MATRIX_WEIGHTS", 128 * 256)  # two parts
    prepare_for_inference(made, torch.bfloat16, activations=activations)
    assert made.product is not None
    assert isinstance(made.product.multiply, PackedProduct)
    assert made.product.multiply.prefers_matrices(x.bfloat16())
    assert not made.product.multiply.prefers_matrices(x[:9].bfloat16())
    assert_equal_but_for_rounding(made(x.bfloat16()), exact)


@pytest.mark.parametrize("activations", list(KERNELS))
@pytest.mark.parametrize("method", ["int8", "int4", "int4-g64-asym"])
def test_inputs_need_not_be_contiguous(method: str, activations: str | None) -> None:
    made = layer(method)
    wide = torch.randn(6, 512).bfloat16()
    inputs = (wide[:, ::2], torch.randn(256, 6).bfloat16().T, wide[::2, :256], torch.empty(0, 256).bfloat16())
    prepare_for_inference(made, torch.bfloat16, activations=activations)
    for x in inputs:
        assert torch.equal(made(x), made(x.clone(memory_format=torch.contiguous_format)))
        assert made(x).shape == (len(x), 72)


@pytest.mark.parametrize("activations", list(KERNELS))
def test_zeros_and_the_number_of_threads_change_nothing(activations: str | None) -> None:
    made, before = layer("int4", 640), torch.get_num_threads()
    prepare_for_inference(made, torch.float32, activations=activations)
    assert not made(torch.zeros(2, 256)).any()
    x = torch.randn(9, 256)
    try:
        torch.set_num_threads(2)
        found = made(x)
        torch.set_num_threads(1)
        assert torch.equal(made(x), found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["int8", "int4-g32-asym"])
def test_gradients_are_those_of_the_plain_path(method: str) -> None:
    made = layer(method)
    grads = []
    for _ in range(2):
        x = torch.linspace(-1, 1, 512).reshape(2, 256).bfloat16().requires_grad_()
        made(x).sum().backward()
        grads.append(x.grad)
        prepare_for_inference(made, torch.bfloat16)
    assert torch.equal(*grads)


@pytest.mark.parametrize("method", ["int4", "int4-g32-asym"])
def test_codes_and_scales_are_held_once_and_come_back(method: str, tmp_path: Path) -> None:
    model = load_base("glm-tiny", dtype="bfloat16", device="cpu", quantization=method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprint = model.fingerprint()
    prepare_for_inference(model)
    codes = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for module in codes:
        assert all(getattr(module, name).is_meta for name in module.stored())
    assert model.fingerprint() == fingerprint
    held = model.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path)
    assert load_base(tmp_path, device="cpu").fingerprint() == fingerprint
    twin = copy.deepcopy(model)
    model.load_state_dict(before)
    for changed in (model, twin, model.float()):
        assert not any(parameter.is_meta for parameter in changed.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name].to(tensor.dtype), tensor) for name, tensor in before.items())


def test_an_embedding_that_shares_its_codes_keeps_them() -> None:
    folder = Path(__file__).resolve().parents[2] / "golden" / "models" / "chatglm"
    model = load_base(folder, dtype="float32", device="cpu")
    from glmtune.quantization.layers.apply import quantize_model

    quantize_model(model, "int4", embeddings=True)
    ids = torch.tensor([[3, 5, 8, 4]])
    inputs = {"input_ids": ids}
    expected = model.get_input_embeddings()(ids)
    prepare_for_inference(model)
    assert torch.equal(model.get_input_embeddings()(**{"input": inputs["input_ids"]}), expected)
    head = model.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    assert head.product is not None
    assert not head.weight.is_meta


class _Attention(nn.Module):
    def __init__(self, methods: tuple[str, str, str]) -> None:
        super().__init__()
        sizes = (256, 64, 64)
        made = [
            layer(method, size, 128, seed)
            for seed, (method, size) in enumerate(zip(methods, sizes, strict=True))
        ]
        self.q_proj, self.k_proj, self.v_proj = made

    def forward(self, x: Tensor) -> list[Tensor]:
        return [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]


@pytest.mark.parametrize("activations", list(KERNELS))
@pytest.mark.parametrize("method", ["int8", "int4", "int4-g32-asym"])
def test_query_key_and_value_are_one_product(method: str, activations: str | None) -> None:
    module = _Attention((method, method, method))
    parts = [layer.quantized().codes_OI.clone() for layer in module.children()]  # type: ignore[union-attr]
    alone = copy.deepcopy(module)
    prepare_for_inference(module, torch.bfloat16, activations=activations)
    for each in alone.children():
        prepare_for_inference(each, torch.bfloat16, activations=activations)
    x, other = torch.randn(2, 3, 128).bfloat16(), torch.randn(1, 128).bfloat16()
    with torch.no_grad():
        for inputs in (x, x[:, :1], other, x):
            for found, right in zip(module(inputs), alone(inputs), strict=True):
                assert torch.equal(found, right)
        module.q_proj(x)
        assert torch.equal(module.v_proj(other), alone.v_proj(other))  # not with the input of the first
        assert torch.equal(module.k_proj(x), alone.k_proj(x))
    for made, codes in zip(module.children(), parts, strict=True):
        assert isinstance(made, QuantizedLinear)
        assert torch.equal(made.quantized().codes_OI, codes)


def test_what_does_not_fit_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Attention(("int4", "int8", "int4"))
    prepare_for_inference(module, torch.bfloat16)
    assert fuse_attention_projections(module) == 0
    calls: list[int] = []
    monkeypatch.setattr(FusedProducts, "multiply", lambda self, index, x: calls.append(index))
    module(torch.randn(1, 128).bfloat16())
    assert calls == []


def test_a_whole_model_with_rounded_activations() -> None:
    model = load_base("glm-tiny", dtype="bfloat16", device="cpu", quantization="int8")
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits.float()
        prepare_for_inference(model, activations="int8")
        found = model(input_ids=ids).logits.float()
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()


def test_activations_that_cannot_be_rounded_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`quantization_activations` is `int7`.*Valid: int8"):
        prepare_for_inference(layer("int4"), activations="int7")
    with pytest.raises(ConfigError, match="`int8`, but the model is not quantized"):
        prepare_for_inference(nn.Linear(4, 4), activations="int8")
