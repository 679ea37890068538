"""Norms and rotary embeddings in one call give what transformers' operations give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.glm import modeling_glm
from transformers.models.glm4 import modeling_glm4

from glmtune.loading import load_model
from glmtune.quantization.kernels import between_products
from glmtune.quantization.kernels.between_products import use_calls_between_products
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels.native import NativeLibrary

pytestmark = pytest.mark.usefixtures("compiled")

DTYPES = (torch.bfloat16, torch.float32)
OWNERS: tuple[Any, ...] = (modeling_glm, modeling_glm4)


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner in OWNERS:  # what is replaced for the process comes back after a test
        original = owner.apply_rotary_pos_emb
        monkeypatch.setattr(owner, "apply_rotary_pos_emb", getattr(original, "__wrapped__", original))


def norm(owner: Any, dtype: torch.dtype) -> nn.Module:
    name = "GlmRMSNorm" if owner is modeling_glm else "Glm4RMSNorm"
    made = getattr(owner, name)(320, eps=1e-5).to(dtype)
    nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("shape", [(1, 1, 320), (3, 100, 320), (0, 4, 320), (5, 320)])
def test_a_norm_is_that_of_transformers(owner: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(norm(owner, dtype))
    before = copy.deepcopy(model)
    assert use_calls_between_products(model) == 1
    assert type(model[0]) in between_products.NORMS.values()
    x = torch.randn(shape).to(dtype) * 3
    with torch.no_grad():
        found, expected = model(x), before(x)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # Squares are added in another order: now and then the last bit of the inner, rounded number is another, which is up
    # to 2^-7 of it, and the product of weight and that is rounded once more.
    unit = 2**-6 if dtype == torch.bfloat16 else 2e-6
    assert torch.allclose(found.float(), expected.float(), rtol=unit, atol=0)
    if dtype == torch.bfloat16:
        assert (found != expected).sum() <= 0.01 * found.numel()


def angles(batch: int, tokens: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turned = torch.randn(batch, tokens, half)
    both = torch.cat((turned, turned), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize(("batch", "angle_batch", "tokens"), [(1, 1, 1), (3, 3, 5), (3, 1, 5), (2, 2, 200)])
def test_states_are_turned_as_by_transformers(
    owner: Any, dtype: torch.dtype, batch: int, angle_batch: int, tokens: int
) -> None:
    original = owner.apply_rotary_pos_emb
    use_calls_between_products(nn.Sequential(norm(owner, dtype)))
    replaced = owner.apply_rotary_pos_emb
    assert replaced is not original
    # Projections lie behind one another in one product's output: the rows of each have gaps.
    whole = torch.randn(batch, tokens, 6 * 32).to(dtype)
    query = whole[..., : 4 * 32].view(batch, tokens, 4, 32).transpose(1, 2)
    key = whole[..., 4 * 32 :].view(batch, tokens, 2, 32).transpose(1, 2)
    kept = whole.clone()
    cos, sin = angles(angle_batch, tokens, 8, dtype)
    found, expected = replaced(query, key, cos, sin), original(query, key, cos, sin)
    assert torch.equal(whole, kept)
    for one, other in zip(found, expected, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(one, other)
        else:  # a compiler may round a product and the sum it goes into at once
            assert torch.allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("owner", OWNERS)
def test_gradients_other_types_and_autocast_are_left_to_transformers(owner: Any) -> None:
    model = nn.Sequential(norm(owner, torch.float32))
    use_calls_between_products(model)
    replaced = owner.apply_rotary_pos_emb
    x = torch.randn(2, 3, 320, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    query = torch.randn(1, 4, 5, 32, requires_grad=True)
    cos, sin = angles(1, 5, 8, torch.float32)
    turned, _ = replaced(query, query, cos, sin)
    turned.sum().backward()
    assert query.grad is not None
    half = [each.half() for each in (query.detach(), query.detach(), cos, sin)]
    for found, expected in zip(replaced(*half), replaced.__wrapped__(*half), strict=True):
        assert torch.equal(found, expected)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_a_whole_model_says_the_same() -> None:
    plain = load_model("glm-tiny", quantization="int4", dtype="float32", device="cpu")
    ids = torch.tensor([[5, 17, 300, 42, 9, 11]])
    with torch.inference_mode():
        expected = plain(ids).logits
        prepare_for_inference(plain)
        changed = [m for m in plain.modules() if type(m) in between_products.NORMS.values()]
        found = plain(ids).logits
    assert len(changed) == 2 * plain.config.num_hidden_layers + 1
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("owner", OWNERS)
def test_a_rotation_replaced_before_does_without_the_compiled_functions(
    owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replacement is the process's, and outlives the library that was there when it was made."""
    use_calls_between_products(nn.Sequential(norm(owner, torch.float32)))
    monkeypatch.setattr(between_products, "native_library", lambda: NativeLibrary(None, "none here"))
    query, (cos, sin) = torch.randn(1, 4, 5, 32), angles(1, 5, 8, torch.float32)
    replaced = owner.apply_rotary_pos_emb
    for found, expected in zip(
        replaced(query, query, cos, sin), replaced.__wrapped__(query, query, cos, sin), strict=True
    ):
        assert torch.equal(found, expected)


def test_without_the_compiled_functions_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(between_products, "native_library", lambda: NativeLibrary(None, "none here"))
    model = nn.Sequential(norm(modeling_glm, torch.float32))
    original = modeling_glm.apply_rotary_pos_emb
    assert use_calls_between_products(model) == 0
    assert type(model[0]) is modeling_glm.GlmRMSNorm
    assert modeling_glm.apply_rotary_pos_emb is original
