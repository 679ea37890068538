"""Parity with the released prefix-tuning code, at the tolerances of the golden set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GlmForCausalLM

from glmtune.models.load import load_official
from glmtune.prefix.attach import attach_prefix, freeze_base
from glmtune.prefix.checkpoint import load_prefix
from glmtune.prefix.encoder import PrefixEncoder
from tests.golden.conftest import Golden
from tests.golden.oracle import close

LOGITS, LOSS, GRADIENT, TRAINING, PREFIX = 1e-4, 2e-5, 1e-5, 5e-5, 1e-4


@pytest.fixture(scope="module", params=["v2", "v2_32k", "glm3"])
def cases(request: pytest.FixtureRequest, golden: Callable[[str], Golden]) -> Golden:
    return golden(request.param)


@pytest.fixture(params=["sdpa", "eager"])
def tuned(request: pytest.FixtureRequest, cases: Golden, kind: str) -> GlmForCausalLM:
    return _tuned(cases, kind, request.param)


def _tuned(cases: Golden, kind: str, attention: str) -> GlmForCausalLM:
    family = {"v2": "chatglm2", "v2_32k": "chatglm2-32k", "glm3": "chatglm3"}[cases.folder.name]
    source = cases.folder / "checkpoint_bin"
    model = load_official(source, dtype=torch.float32, family=family, attn_implementation=attention).eval()
    encoder = load_prefix(cases.folder / f"ptuning_{kind}", model)
    encoder.dropout = 0.0
    attach_prefix(model, encoder)
    return model


def _prefix(model: GlmForCausalLM) -> PrefixEncoder:
    return model.model.prefix_encoder


@torch.no_grad()
def test_keys_and_values_have_the_official_layout(cases: Golden, kind: str, tuned: GlmForCausalLM) -> None:
    expected = cases.case(f"{kind}.prefix")["kv"]  # [layers, 2, prefix, batch, groups, size]
    close(_prefix(tuned)(), expected[:, :, :, 0], 1e-6)
    states = _prefix(tuned).layer_states(expected.shape[3], torch.float32)
    stacked = torch.stack([torch.stack(pair) for pair in states])
    close(stacked.permute(0, 1, 4, 2, 3, 5), expected, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain_b", "left_padded", "train_right_padded", "single_token"])
def test_forward(cases: Golden, kind: str, tuned: GlmForCausalLM, case: str) -> None:
    expected = cases.case(f"{kind}.{case}")
    inputs = cases.inputs(f"{kind}.{case}")
    output = tuned(**inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    if "logits" in expected:
        close(output.logits[real], expected["logits"][real], LOGITS)
    if "loss" in expected:
        close(output.loss, expected["loss"][0], LOSS)
        labels = inputs["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        close(losses, expected["nll"], LOGITS)


@torch.no_grad()
def test_decoding_with_a_cache(cases: Golden, kind: str, tuned: GlmForCausalLM) -> None:
    case, inputs = cases.case(f"{kind}.kv_left"), cases.inputs(f"{kind}.kv_left")
    prefill = int(cases.values[f"{kind}.kv_left"]["prefill_len"])  # pyright: ignore[reportArgumentType]
    steps: list[Tensor] = []
    cache = None
    length = inputs["input_ids"].shape[1]
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, length))]:
        output = tuned(
            input_ids=inputs["input_ids"][:, start:end],
            attention_mask=inputs["attention_mask"][:, :end],
            position_ids=inputs["position_ids"][:, start:end],
            cache=cache,
            use_cache=True,
        )
        cache = output.cache
        steps.append(output.logits)
    real = inputs["attention_mask"].bool()
    close(torch.cat(steps, dim=1)[real], case["logits_steps"][real], LOGITS)
    # The released cache starts with the prefix; ours holds the tokens alone.
    expected = case["past_key_last"].permute(1, 2, 0, 3)
    prefix_key = _prefix(tuned).layer_states(expected.shape[0], torch.float32)[-1][0]
    whole = torch.cat([prefix_key, cache.layers[-1].keys], dim=2)
    visible = torch.cat([torch.ones(real.shape[0], prefix_key.shape[2], dtype=torch.bool), real], dim=1)
    close(whole.transpose(1, 2)[visible], expected.transpose(1, 2)[visible], LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("case", ["generate", "generate_left"])
def test_greedy_generation(cases: Golden, kind: str, tuned: GlmForCausalLM, case: str) -> None:
    expected, inputs = cases.case(f"{kind}.{case}")["sequences"], cases.inputs(f"{kind}.{case}")
    inputs.pop("position_ids", None)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    new = expected.shape[1] - inputs["input_ids"].shape[1]
    sequences = tuned.generate(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(sequences, expected)


@pytest.fixture(params=["plain", "checkpointed"])
def trainable(request: pytest.FixtureRequest, tuned: GlmForCausalLM) -> GlmForCausalLM:
    freeze_base(tuned)
    tuned.train()
    if request.param == "checkpointed":
        tuned.gradient_checkpointing_enable()
    return tuned


def test_gradient(cases: Golden, kind: str, trainable: GlmForCausalLM) -> None:
    case = cases.case(f"{kind}.gradient")
    loss = trainable(**cases.inputs(f"{kind}.train_right_padded")).loss
    close(loss.detach(), case["loss"][0], LOSS)
    loss.backward()
    named = dict(_prefix(trainable).named_parameters())
    for name, expected in case.items():
        if name.startswith("grad."):
            gradient = named[name.removeprefix("grad.")].grad
            assert gradient is not None
            close(gradient, expected, GRADIENT * float(expected.abs().max()))


def test_twenty_training_steps(cases: Golden, kind: str, trainable: GlmForCausalLM) -> None:
    case = cases.case(f"{kind}.train20")
    settings = cases.values[f"{kind}.train20"]["optimizer"]
    assert isinstance(settings, dict)
    weights = list(_prefix(trainable).parameters())
    optimizer = torch.optim.AdamW(weights, lr=settings["lr"], eps=settings["eps"], weight_decay=0.0)
    losses, norms = [], []
    for step in range(20):
        loss = trainable(**cases.inputs(f"train_batch.{step % 2}")).loss
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in weights]))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    close(torch.stack(losses), case["losses"], TRAINING)
    torch.testing.assert_close(torch.stack(norms), case["grad_norms"], rtol=2e-5, atol=2e-5)
    close(_prefix(trainable).embedding.weight.detach(), case["final.embedding.weight"], PREFIX)
    trainable.eval()
    with torch.no_grad():
        probe = trainable(cases.inputs(f"{kind}.plain_b")["input_ids"]).logits[:, -4:]
    close(probe, case["final_probe_logits_last4"], LOGITS)
