"""Gated prefixes in the engine: what the model with the prefix attached gives, read whole and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.prefix.attach import attach_prefix, detach_prefix
from glmtune.prefix.checkpoint import load_prefix
from tests.inference.engine.cases import plain_generate, shared_prompts
from tests.inference.engine.requests import engine_of, finish, load, write_prefix

ASKED = [("", 1.0), ("gated", 1.0), ("gated", 0.4), ("gated-b", 1.0), ("short", 1.0), ("short", 0.4)]
COUNT = 7


@torch.no_grad()
def uncached(model: Any, prompt: list[int], strength: float) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, the whole text read again for each of them."""
    ids, found = list(prompt), []
    for _ in range(COUNT):
        scores = model(torch.tensor([ids]), prefix_strength=strength).logits[0, -1].log_softmax(-1)
        ids.append(int(scores.argmax()))
        found.append(float(scores.max()))
    return ids[len(prompt) :], found


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
@pytest.mark.parametrize("kv_cache", ["plain", "int8"])
def test_a_mixed_batch_is_the_uncached_forward(name: str, kv_cache: str, tmp_path: Path) -> None:
    model = load(name)
    engine = engine_of(model, tmp_path, batch_size=16, kv_cache=kv_cache)
    prompts = shared_prompts(model.config)[:3]
    sampling = Sampling(max_new_tokens=COUNT, ignore_eos=True, logprobs=1)
    cases = [(prompt, adapter, strength) for prompt in prompts for adapter, strength in ASKED]
    running = [
        engine.submit(
            Request(prompt_ids=tuple(prompt), sampling=sampling, adapter=adapter, strength=strength)
        )
        for prompt, adapter, strength in cases
    ]
    finish(engine)
    results = [generation.result() for generation in running]
    plain, distinct = load(name), set()
    for (prompt, adapter, strength), result in zip(cases, results, strict=True):
        detach_prefix(plain)
        if adapter:
            attach_prefix(plain, load_prefix(tmp_path / adapter, plain).eval())
        tokens, scores = uncached(plain, prompt, strength if adapter else 1.0)
        assert result.logprobs[0].logprob == pytest.approx(scores[0], abs=1e-4)
        if kv_cache == "plain":
            assert list(result.token_ids) == tokens
            assert [entry.logprob for entry in result.logprobs] == pytest.approx(scores, abs=1e-4)
        distinct.add((tuple(prompt), tuple(tokens), round(scores[0], 3)))
    assert len(distinct) > 12


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_attached_to_the_model(name: str, tmp_path: Path) -> None:
    """As `predict`, `eval` and `chat` run it: one prefix for all rows."""
    model = load(name)
    attach_prefix(
        model, load_prefix(write_prefix(model, tmp_path, seed=5, length=4, gate=True), model).eval()
    )
    engine = engine_of(model)
    prompts = shared_prompts(model.config)[:6]
    sampling = Sampling(max_new_tokens=COUNT, ignore_eos=True)
    running = [engine.submit(Request(prompt_ids=tuple(prompt), sampling=sampling)) for prompt in prompts]
    finish(engine)
    expected = [plain_generate(model, prompt, (), COUNT) for prompt in prompts]
    assert [list(generation.result().token_ids) for generation in running] == expected
    detach_prefix(model)
    assert expected != [plain_generate(model, prompt, (), COUNT) for prompt in prompts]


def test_it_takes_no_columns_of_its_rows(tmp_path: Path) -> None:
    model = load("chatglm2")
    engine = engine_of(model, tmp_path)
    held = {}
    for adapter in ("", "short", "gated"):
        engine.submit(
            Request(
                prompt_ids=tuple(range(5, 15)),
                sampling=Sampling(max_new_tokens=4, ignore_eos=True),
                adapter=adapter,
            )
        )
        engine.step()
        engine.step()
        held[adapter] = engine.stats().cache_tokens
        finish(engine)
    assert held["gated"] == held[""] == held["short"] - 3
