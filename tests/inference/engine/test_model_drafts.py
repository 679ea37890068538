"""A smaller model's drafts change no answer, are right where it agrees, and cost no row its place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from glmtune.errors import ConfigError
from glmtune.inference.engine.batching import drafting
from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.model import Drafting
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.loading import load_base
from tests.inference.engine.cases import FAMILIES, plain_generate, shared_prompts
from tests.inference.engine.requests import add_adapters, alone, engine_of, finish, load, mixed_requests


@pytest.fixture(autouse=True)
def drafts_whatever_they_cost(monkeypatch):
    monkeypatch.setitem(drafting.TOKEN_COST, "cpu", 0.0)


def disturbed(model, share: float):
    """A model that mostly agrees: its own copy with other last weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    with torch.no_grad():
        weight = other.lm_head.weight
        weight += share * weight.std() * torch.randn_like(weight)
    return other


def engine_with(model, draft, *, tokens: int = 4, **settings) -> Engine:
    """Draft as if that cost nothing: in these tests the smaller model is as large as the other."""
    engine = Engine(model, EngineSettings(**settings), Drafting(draft, tokens))
    drafting_model = engine._model.draft_model
    assert drafting_model is not None
    assert drafting_model.cost == pytest.approx(1)
    engine._model.draft_model = replace(drafting_model, cost=0.0)
    return engine


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_answer_is_that_without_drafts(name):
    model = load(name)
    engine = engine_with(model, disturbed(model, 0.5), reuse_caches=False)
    for prompt in shared_prompts(model.config)[:4]:
        found = alone(engine, Request(prompt_ids=tuple(prompt), sampling=Sampling(max_new_tokens=24)))
        assert list(found.token_ids) == plain_generate(model, prompt, (), 24)
    stats = engine.stats()
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 10  # some right, some wrong


def test_the_model_itself_is_always_right():
    """So every pass but the last takes five tokens: four drafted, and the one behind."""
    model = load("chatglm2")
    engine = engine_with(model, copy.deepcopy(model))
    prompt = shared_prompts(model.config)[1]
    found = alone(engine, Request(prompt_ids=tuple(prompt), sampling=Sampling(max_new_tokens=26)))
    assert list(found.token_ids) == plain_generate(model, prompt, (), 26)
    stats = engine.stats()
    assert stats.num_draft_tokens == stats.num_accepted_tokens == 20  # 1 read with the prompt + 5 x 5


@pytest.mark.parametrize("lookup", [0, 3])
def test_among_others_of_all_kinds(lookup, tmp_path):
    """Rows join, leave and are sent back, some have adapters that the smaller model has not."""
    model = load("chatglm2")
    quiet = engine_of(model, tmp_path, reuse_caches=False)
    requests = mixed_requests(model)
    expected = [alone(quiet, request) for request in requests]
    busy = engine_with(
        model, disturbed(model, 0.2), batch_size=7, piece_tokens=5, prompt_lookup_tokens=lookup
    )
    add_adapters(busy, model, tmp_path / "again")
    generations = []
    for request in requests:
        generations.append(busy.submit(request))
        busy.step()
    finish(busy)
    for generation, other in zip(generations, expected, strict=True):
        found = generation.result()
        assert (found.token_ids, found.finish_reason) == (other.token_ids, other.finish_reason)
    assert busy.stats().num_accepted_tokens > 10
    drafter = busy._open_batch.drafter
    assert not drafter._by_model._shadows  # who has ended is let go of
    assert len(drafter._by_model._running) == 0


def test_many_prompts(tmp_path):
    model = load("glm4")
    prompts = shared_prompts(model.config)
    engine = engine_with(model, disturbed(model, 0.2), batch_size=3, min_shared_gain=1)
    samplings = [Sampling(max_new_tokens=12)] * len(prompts)
    made = sorted(engine.complete(prompts, samplings, stop_ids=()), key=lambda each: each.index)
    assert [list(each.token_ids) for each in made] == [plain_generate(model, p, (), 12) for p in prompts]
    assert sum(each.num_accepted_tokens for each in made) > 10


def test_its_keys_and_values_are_in_the_budget():
    model = load("chatglm2")
    plain, engine = engine_of(model), engine_with(model, copy.deepcopy(model))
    assert engine.stats().token_bytes == 2 * plain.stats().token_bytes


def test_another_vocabulary_and_settings_without_a_model_are_refused():
    other = load_base("glm-tiny", device="cpu")
    with pytest.raises(
        ConfigError, match=r"The model that drafts has 4,864 tokens, but the one that answers"
    ):
        Engine(load("chatglm2"), draft=Drafting(other, 4))
    with pytest.raises(ConfigError, match=r"`draft.quantization` is `int4`, but no model is to draft"):
        DraftSettings(quantization="int4")
    with pytest.raises(ConfigError, match=r"`draft.num_tokens` is 0"):
        DraftSettings(source="glm-tiny", num_tokens=0)
