"""The gate of a prefix: the formula by hand, the start at the base, what moves first, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_base
from glmtune.models.load import GlmModel
from glmtune.prefix.attach import attach_prefix, freeze_base, without_prefix
from glmtune.prefix.checkpoint import (
    describe_prefix,
    export_official_prefix,
    load_prefix,
    save_prefix,
)
from glmtune.prefix.encoder import PrefixEncoder, describe_shape, prefix_shape
from glmtune.prefix.gate import add_gated
from glmtune.prefix.init import build_prefix_encoder, take_over
from glmtune.prefix.settings import PrefixSettings
from tests.prefix.conftest import make_base, make_opened, make_prefix, random_ids
from tests.prefix.direct import direct_logits

IDS = random_ids(2, 9)
PADDED = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
MASKS = pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])


@pytest.mark.parametrize("shared", [False, True])
def test_the_formula_by_hand(shared: bool) -> None:
    """Plain softmaxes in float64, head by head."""
    torch.manual_seed(0)
    number = torch.float64
    query, key, value = (torch.randn(2, heads, 6, 8, dtype=number) for heads in (4, 2, 2))
    prefix_key, prefix_value = (torch.randn(1 if shared else 2, 2, 5, 8, dtype=number) for _ in range(2))
    gate, scaling = torch.randn(4, dtype=number).tanh(), 0.3
    tokens, expected = torch.zeros(2, 6, 4, 8, dtype=number), torch.zeros(2, 6, 4, 8, dtype=number)
    for row in range(2):
        for head in range(4):
            at, front = head // 2, 0 if shared else row
            for place in range(6):
                asked = query[row, head, place]
                shares = torch.softmax(key[row, at, : place + 1] @ asked * scaling, dim=0)
                tokens[row, place, head] = shares @ value[row, at, : place + 1]
                shares = torch.softmax(prefix_key[front, at] @ asked * scaling, dim=0)
                added = gate[head] * (shares @ prefix_value[front, at])
                expected[row, place, head] = tokens[row, place, head] + added
    found = add_gated(tokens, query, (prefix_key, prefix_value), gate, scaling=scaling)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_whole_model_in_float64(attention: str) -> None:
    model = make_base(attention).double()
    encoder = make_opened(model, projection=True)
    attach_prefix(model, encoder)
    assert encoder.gate is not None
    gates = encoder.gate.weight.tanh().double()
    logits = model(IDS).logits
    for row in range(2):
        expected = direct_logits(model, IDS[row], encoder().double(), gates)
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-6)  # rotary angles are float32


@MASKS
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_new_one_is_the_base_bit_by_bit(
    attention: str, kind: str, training: bool, mask: Tensor | None
) -> None:
    model = make_base(attention)
    if kind == "bfloat16":
        model.bfloat16()
    attach_prefix(model, make_prefix(model, gate=True, dropout=0.5))
    model.train(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        tuned = model(IDS, attention_mask=mask, use_cache=False).logits
        with without_prefix(model):
            base = model(IDS, attention_mask=mask, use_cache=False).logits
    assert torch.equal(tuned, base)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gates_move_first_and_the_prefix_follows(checkpointed: bool) -> None:
    model = make_base()
    encoder = make_prefix(model, projection=True, gate=True)
    attach_prefix(model, encoder)
    frozen = freeze_base(model)
    assert frozen == sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert encoder.gate is not None
    before = {name: weight.detach().clone() for name, weight in encoder.named_parameters()}
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    losses = []
    for step in range(8):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        for name, weight in encoder.named_parameters():
            assert weight.grad is not None
            is_moved = bool(weight.grad.abs().sum() > 0)
            assert is_moved == (step > 0 or name == "gate.weight"), (step, name)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(weight, before[name]) for name, weight in encoder.named_parameters())


def test_the_gradient_of_the_gate_is_that_of_the_formula() -> None:
    model = make_base().double()
    encoder = make_opened(model)
    attach_prefix(model, encoder)
    freeze_base(model)
    assert encoder.gate is not None
    with torch.no_grad():  # where float32, in which gates are computed, resolves the steps below
        encoder.gate.weight.mul_(0.3)

    def loss() -> Tensor:  # in float64; the model's own is float32
        logits = model(IDS, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())

    loss().backward()
    assert encoder.gate.weight.grad is not None
    for place in [(0, 0), (1, 3)]:
        numbers, step = [], 1e-3
        for sign in (1, -1):
            with torch.no_grad():
                encoder.gate.weight[place] += sign * step
                numbers.append(float(loss().detach()))
                encoder.gate.weight[place] -= sign * step
        slope = (numbers[0] - numbers[1]) / (2 * step)
        assert float(encoder.gate.weight.grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


@torch.no_grad()
@MASKS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_strength_multiplies_the_gate(attention: str, mask: Tensor | None) -> None:
    model = make_base(attention)
    encoder = make_opened(model)
    attach_prefix(model, encoder)
    assert encoder.gate is not None
    tuned = model(IDS, attention_mask=mask).logits
    assert torch.equal(model(IDS, attention_mask=mask, prefix_strength=1.0).logits, tuned)
    half = model(IDS, attention_mask=mask, prefix_strength=0.5).logits
    without = model(IDS, attention_mask=mask, prefix_strength=0.0).logits
    with without_prefix(model):  # the stock kernel may round otherwise; see the test of a loaded base
        base = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(base, without, rtol=1e-5, atol=1e-5)
    encoder.gate.weight.copy_((encoder.gate.weight.tanh() / 2).atanh())
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits, half, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(half, tuned, atol=1e-2)
    assert not torch.allclose(half, without, atol=1e-2)


@torch.no_grad()
@MASKS
def test_a_loaded_base_bit_by_bit(tiny_base: Path, mask: Tensor | None) -> None:
    """At strength 0, and new at any strength, also without gradients."""
    model = load_base(tiny_base, device="cpu", dtype="float32")
    base = model(IDS, attention_mask=mask).logits
    encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=4, gate=True))
    attach_prefix(model, encoder)
    assert encoder.gate is not None
    for strength in (0.0, 0.3, 1.0, 2.0):
        assert torch.equal(model(IDS, attention_mask=mask, prefix_strength=strength).logits, base)
    encoder.gate.weight.fill_(0.4)
    assert torch.equal(model(IDS, attention_mask=mask, prefix_strength=0.0).logits, base)
    assert not torch.allclose(model(IDS, attention_mask=mask).logits, base, atol=1e-3)


@torch.no_grad()
def test_attention_weights_show_both_softmaxes() -> None:
    model = make_base("eager")
    encoder = make_opened(model)
    attach_prefix(model, encoder)
    assert encoder.gate is not None
    for layer, weights in enumerate(model(IDS, output_attentions=True).attentions):
        prefix, tokens = weights.split((5, 9), dim=3)
        gates = encoder.gate.weight[layer].tanh()[:, None].expand(2, 4, 9)
        torch.testing.assert_close(tokens.sum(3), torch.ones(2, 4, 9))
        torch.testing.assert_close(prefix.sum(3), gates)


class TestFirstGeneration:
    @pytest.fixture
    def model(self, oracles: Path) -> GlmModel:
        return load_base(oracles / "v1" / "checkpoint_bin", device="cpu", dtype="float32")

    @torch.no_grad()
    @pytest.mark.parametrize("is_padded", [False, True])
    def test_start_and_strength(self, model: GlmModel, is_padded: bool) -> None:
        config = model.config
        ids = torch.tensor([[7, 8, 9, 10, config.gmask_token_id, config.bos_token_id, 11, 12]])
        mask = None
        if is_padded:
            ids = torch.cat([torch.full_like(ids[:, :2], config.pad_token_id), ids], dim=1)
            mask = (torch.arange(ids.shape[1]) >= 2).long()[None]
        base = model(ids, attention_mask=mask).logits
        torch.manual_seed(4)
        encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=3, gate=True, dropout=0))
        attach_prefix(model, encoder)
        assert torch.equal(model(ids, attention_mask=mask).logits, base)
        assert encoder.gate is not None
        encoder.gate.weight.normal_()
        opened = model(ids, attention_mask=mask).logits
        assert not torch.allclose(opened, base, atol=1e-3)
        assert torch.equal(model(ids, attention_mask=mask, prefix_strength=0.0).logits, base)
        # A position that stands there twice changes nothing: shares halve, and the sum stays.
        twice = PrefixEncoder(encoder.shape, pre_seq_len=6, num_gates=config.num_attention_heads).eval()
        twice.embedding.weight.copy_(encoder.embedding.weight.repeat(2, 1))
        assert twice.gate is not None
        twice.gate.weight.copy_(encoder.gate.weight)
        attach_prefix(model, twice)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, opened, rtol=1e-4, atol=1e-5)

    def test_cached_steps_are_one_uncached_pass(self, model: GlmModel) -> None:
        config = model.config
        ids = torch.tensor([[7, 8, 9, 10, config.gmask_token_id, config.bos_token_id]])
        torch.manual_seed(4)
        encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=3, gate=True))
        attach_prefix(model, encoder)
        assert encoder.gate is not None
        torch.nn.init.normal_(encoder.gate.weight)
        asked = {
            "max_new_tokens": 6,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        out = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **asked)
        with torch.no_grad():
            whole = model(out.sequences).logits[0, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.cat(out.logits), whole, rtol=1e-4, atol=1e-5)


class TestFile:
    @pytest.mark.parametrize("projection", [False, True])
    def test_it_comes_back_bit_for_bit(self, tmp_path: Path, projection: bool) -> None:
        model = make_base()
        encoder = make_opened(model, projection=projection)
        file = save_prefix(encoder, tmp_path)
        loaded = load_prefix(file, model)
        assert loaded.state_dict().keys() == encoder.state_dict().keys()
        for name, weight in encoder.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name
        assert describe_prefix(file).gate is True
        assert describe_shape(loaded).startswith("a gated prefix of 5 positions")
        with safe_open(file, framework="pt") as opened:
            assert json.loads(opened.metadata()["gate"]) is True

    def test_others_say_nothing_of_gates(self, tmp_path: Path) -> None:
        model = make_base()
        file = save_prefix(make_prefix(model), tmp_path)
        with safe_open(file, framework="pt") as opened:
            assert "gate" not in opened.metadata()
        assert describe_prefix(file).gate is False
        assert load_prefix(file, model).gate is None

    def test_a_contradiction_is_refused(self, tmp_path: Path) -> None:
        file = save_prefix(make_opened(make_base()), tmp_path)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file(load_file(file), file, metadata={**metadata, "gate": "false"})
        with pytest.raises(CheckpointError, match=r"says gate = .*alse, but it must be True"):
            load_prefix(file, make_base())

    def test_gates_of_other_heads_are_refused(self, tmp_path: Path) -> None:
        shape = prefix_shape(make_base().config)
        file = save_prefix(PrefixEncoder(shape, pre_seq_len=5, num_gates=6), tmp_path)
        with pytest.raises(CheckpointError, match=r"gates for 2 layers x 6 query heads, the model has 2 x 4"):
            load_prefix(file, make_base())

    def test_the_official_file_cannot_hold_it(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"tuned with `prefix.gate=true`.*no place for a gate.*in glmtune"
        ):
            export_official_prefix(make_opened(make_base()), tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestTakeOver:
    @pytest.mark.parametrize("length", [3, 5, 8])
    @pytest.mark.parametrize("projection", [False, True])
    def test_gates_are_kept(self, length: int, projection: bool) -> None:
        model = make_base()
        saved = make_opened(model, projection=projection)
        settings = PrefixSettings(pre_seq_len=length, gate=True)  # a projection is computed once
        encoder = build_prefix_encoder(model, settings)
        take_over(saved, encoder, settings, "runs/old")
        assert encoder.gate is not None
        assert saved.gate is not None
        assert torch.equal(encoder.gate.weight, saved.gate.weight)
        if length == 5:
            attach_prefix(model, saved)
            with torch.no_grad():
                expected = model(IDS).logits
                attach_prefix(model, encoder.eval())
                torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("is_gated", [False, True])
    def test_the_other_kind_is_refused(self, is_gated: bool) -> None:
        model = make_base()
        settings = PrefixSettings(pre_seq_len=5, gate=not is_gated)
        message = rf"`prefix.gate` is {str(not is_gated).lower()}, but the prefix `runs/old` was tuned "
        message += rf"{'with' if is_gated else 'without'} one.*Use `prefix.gate={str(is_gated).lower()}`"
        with pytest.raises(ConfigError, match=message):
            take_over(
                make_prefix(model, gate=is_gated), build_prefix_encoder(model, settings), settings, "runs/old"
            )
