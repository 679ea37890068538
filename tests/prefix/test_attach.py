"""Attaching, detaching, swapping and training a prefix."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from transformers import GlmForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from glmtune.errors import ConfigError, ShapeError
from glmtune.prefix.attach import attach_prefix, detach_prefix, freeze_base, prefix_of, without_prefix
from glmtune.prefix.encoder import PrefixEncoder, PrefixShape
from tests.prefix.conftest import make_base, make_prefix, random_ids

IDS = random_ids(3, 9)


def _train(model: GlmForCausalLM, steps: int, *, rate: float = 0.05) -> list[float]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _gradients(model: GlmForCausalLM) -> list[Tensor]:
    encoder = prefix_of(model)
    assert encoder is not None
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return [weight.grad.clone() for weight in encoder.parameters() if weight.grad is not None]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detaching_restores_the_stock_model(attention: str) -> None:
    model = make_base(attention)
    before, names = model(IDS).logits, list(model.state_dict())
    encoder = make_prefix(model)
    attach_prefix(model, encoder)
    assert model.config._attn_implementation == f"glmtune_{attention}"
    assert prefix_of(model) is encoder
    assert not torch.allclose(model(IDS).logits, before)
    assert detach_prefix(model) is encoder
    assert torch.equal(model(IDS).logits, before)
    assert model.config._attn_implementation == attention
    assert list(model.state_dict()) == names
    assert prefix_of(model) is None
    assert not model.model._forward_pre_hooks
    assert detach_prefix(model) is None


@torch.no_grad()
def test_another_prefix_leaves_no_residue() -> None:
    model = make_base()
    first, second = make_prefix(model, seed=1), make_prefix(model, seed=2, length=3, projection=True)
    attach_prefix(model, second)
    expected = model(IDS).logits
    attach_prefix(model, first)
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    attach_prefix(model, second)
    assert torch.equal(model(IDS).logits, expected)
    assert len(model.model._forward_pre_hooks) == 1


@torch.no_grad()
def test_without_prefix_puts_it_back_even_after_an_error() -> None:
    model = make_base()
    before = model(IDS).logits
    encoder = make_prefix(model)
    attach_prefix(model, encoder)

    def fail() -> None:
        with without_prefix(model):
            assert torch.equal(model(IDS).logits, before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert prefix_of(model) is encoder


@torch.no_grad()
def test_copies_and_pickles_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base()
    attach_prefix(model, make_prefix(model))
    expected = model(IDS).logits
    copied, stored = copy.deepcopy(model), pickle.dumps(model)
    prefix_of(model).embedding.weight.zero_()
    assert torch.equal(copied(IDS).logits, expected)
    for interface in (AttentionInterface, AttentionMaskInterface):  # as in a process that never attached one
        stock = {key: value for key, value in interface._global_mapping.items() if "glmtune" not in key}
        monkeypatch.setattr(interface, "_global_mapping", stock)
    revived = pickle.loads(stored)
    assert torch.equal(revived(IDS).logits, expected)
    detach_prefix(copied)
    assert copied.config._attn_implementation == "sdpa"
    assert not copied.model._forward_pre_hooks
    assert len(model.model._forward_pre_hooks) == 1


@torch.no_grad()
def test_a_model_sharing_the_config_is_unharmed() -> None:
    model = make_base()
    other = GlmForCausalLM(model.config).eval()
    before = other(IDS).logits
    attach_prefix(model, make_prefix(model))
    torch.testing.assert_close(other(IDS).logits, before)


@pytest.mark.parametrize("stock", ["flash_attention_2", "flex_attention"])
def test_other_attention_is_refused(stock: str) -> None:
    model = make_base()
    model.config._attn_implementation_internal = stock
    with pytest.raises(ConfigError, match=rf"`{stock}`.*`sdpa`, `eager`.*set_attn_implementation\('sdpa'\)"):
        attach_prefix(model, make_prefix(model))


def test_changing_the_attention_under_a_prefix_is_refused() -> None:
    model = make_base()
    attach_prefix(model, make_prefix(model))
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match=r"changed to `eager`.*would ignore the prefix.*Detach"):
        model(IDS)
    detach_prefix(model)
    assert model.config._attn_implementation == "eager"


def test_a_prefix_of_another_shape_is_refused() -> None:
    encoder = PrefixEncoder(PrefixShape(3, 2, 8), pre_seq_len=4)
    with pytest.raises(
        ShapeError, match=r"made for 3 layers x 2 key/value heads x head_dim 8.*has 2 layers x 2"
    ):
        attach_prefix(make_base(), encoder)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": False}])
def test_reentrant_checkpointing_is_refused(options: dict[str, object]) -> None:
    model = make_base().train()
    attach_prefix(model, make_prefix(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    with pytest.raises(
        ConfigError, match=r"use_reentrant=True.*must be False.*gradient_checkpointing_kwargs"
    ):
        model(IDS, labels=IDS)
    model.eval()
    with torch.no_grad():
        model(IDS)  # nothing is checkpointed here


@pytest.mark.parametrize("projection", [False, True])
def test_training_moves_the_prefix_and_leaves_the_base_bit_identical(projection: bool) -> None:
    model = make_base()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    encoder = make_prefix(model, projection=projection, dropout=0.1)
    start = [weight.detach().clone() for weight in encoder.parameters()]
    attach_prefix(model, encoder)
    assert freeze_base(model) == sum(weight.numel() for weight in before.values())
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trainable == [f"model.prefix_encoder.{name}" for name, _ in encoder.named_parameters()]
    model.train()
    losses = _train(model, 5)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(start, encoder.parameters(), strict=True))
    detach_prefix(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_freezing_without_a_prefix_freezes_everything() -> None:
    model = make_base()
    assert freeze_base(model) == model.num_parameters()
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("projection", [False, True])
def test_checkpointing_gives_the_same_gradient(projection: bool) -> None:
    model = make_base().train()
    attach_prefix(model, make_prefix(model, projection=projection))
    freeze_base(model)
    expected = _gradients(model)
    model.gradient_checkpointing_enable()
    for actual, wanted in zip(_gradients(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_forwards_before_one_backward(checkpointed: bool) -> None:
    model = make_base().train()
    attach_prefix(model, make_prefix(model, projection=True))
    freeze_base(model)
    expected = [2 * gradient for gradient in _gradients(model)]
    if checkpointed:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    (model(IDS, labels=IDS).loss + model(IDS, labels=IDS).loss).backward()
    for weight, wanted in zip(prefix_of(model).parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_a_float32_prefix(dtype: torch.dtype, attention: str) -> None:
    model = make_base(attention)
    attach_prefix(model, make_prefix(model, projection=True))
    freeze_base(model)
    expected = model(IDS).logits.detach()
    wanted = _gradients(model)
    exact = [weight.detach().clone() for weight in prefix_of(model).parameters()]
    model.to(dtype).train()
    assert model.lm_head.weight.dtype == dtype
    for weight, before in zip(prefix_of(model).parameters(), exact, strict=True):
        assert torch.equal(weight, before)  # float32 to the last bit
    logits = model(IDS).logits
    assert logits.dtype == dtype
    scale = float(expected.abs().max())
    assert float((logits.detach().float() - expected).abs().max()) < 0.05 * scale
    for actual, reference in zip(_gradients(model), wanted, strict=True):
        assert actual.dtype == torch.float32
        assert float((actual - reference).norm()) < 0.1 * float(reference.norm())
    sequences = model.eval().generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert sequences.shape == (3, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast(attention: str) -> None:
    model = make_base(attention)
    encoder = make_prefix(model, projection=True)
    attach_prefix(model, encoder)
    freeze_base(model)
    expected, wanted = model(IDS).logits.detach(), _gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder().dtype == torch.float32
        assert torch.equal(encoder(), encoder())
        logits = model(IDS).logits
        gradients = _gradients(model)
    assert logits.dtype == torch.bfloat16
    assert float((logits.detach().float() - expected).abs().max()) < 0.05 * float(expected.abs().max())
    for actual, reference in zip(gradients, wanted, strict=True):
        assert float((actual - reference).norm()) < 0.1 * float(reference.norm())


@torch.no_grad()
def test_eager_attention_weights_show_the_prefix_first() -> None:
    model = make_base("eager")
    attach_prefix(model, make_prefix(model, length=5))
    weights = model(IDS, output_attentions=True).attentions[0]
    assert weights.shape == (3, 4, 9, 5 + 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 9))
    assert bool((weights[..., :5] > 0).all())
    assert float(weights[..., 0, 6:].max()) == 0.0  # the first token sees the prefix and itself


def test_compiled_forward_and_gradient() -> None:
    model = make_base(num_hidden_layers=1).train()
    attach_prefix(model, make_prefix(model, projection=True))
    freeze_base(model)
    expected = model(IDS).logits
    wanted = _gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    output = compiled(IDS, labels=IDS)
    torch.testing.assert_close(output.logits, expected)
    output.loss.backward()
    for weight, reference in zip(prefix_of(model).parameters(), wanted, strict=True):
        torch.testing.assert_close(weight.grad, reference)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_static_cache(attention: str) -> None:
    """A static cache hands out room for later tokens too, which no token of the prompt may see."""
    model = make_base(attention)
    attach_prefix(model, make_prefix(model))
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, **settings, cache_implementation="static"), expected)
