"""Guessed tokens change no answer, only how many passes it takes."""

from __future__ import annotations

from collections import Counter

import pytest

from glmtune.inference.engine import model as engine_model
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from tests.inference.engine.cases import plain_generate, shared_prompts
from tests.inference.engine.requests import STOP, alone, engine_of, finish, load


@pytest.fixture
def passes(monkeypatch):
    sizes: Counter[int] = Counter()
    real = engine_model.EngineModel.step

    def spy(self, tokens, positions, states):
        sizes[len(tokens[0])] += 1
        return real(self, tokens, positions, states)

    monkeypatch.setattr(engine_model.EngineModel, "step", spy)
    return sizes


@pytest.mark.parametrize("name", ["chatglm2", "chatglm", "chatglm-march", "glm4"])
def test_the_answer_is_that_without_guesses(name, passes):
    model = load(name)
    engine = engine_of(model, reuse_caches=False)
    for prompt in shared_prompts(model.config)[:5]:
        sampling = Sampling(max_new_tokens=40, lookup_tokens=6)
        expected = plain_generate(model, prompt, (), 40)
        found = alone(engine, Request(prompt_ids=tuple(prompt), sampling=sampling))
        assert list(found.token_ids) == expected
    assert sum(count for size, count in passes.items() if size > 1) > 3
    assert passes.total() < 5 * 39  # what is repeated takes fewer passes than tokens


def test_beside_others_and_with_penalties_stops_and_limits(passes, tmp_path):
    model = load("chatglm2")
    prompts = shared_prompts(model.config)
    kinds = [
        {"max_new_tokens": 30},
        {"max_new_tokens": 30, "repetition_penalty": 1.05, "logprobs": 1},
        {"max_new_tokens": 25, "frequency_penalty": 0.2},
        {"max_new_tokens": 22, "temperature": 0.7, "seed": 3},
        {"max_new_tokens": 2},
    ]
    adapters = ["", "long", "lora-a", "short"]
    requests = {
        lookup: [
            Request(
                prompt_ids=tuple(prompts[place % len(prompts)]),
                sampling=Sampling(**kinds[place % len(kinds)], lookup_tokens=lookup * (place % 3 > 0)),
                stop_ids=STOP,
                adapter=adapters[place % len(adapters)],
            )
            for place in range(12)
        ]
        for lookup in (0, 4)
    }
    quiet, busy = engine_of(model, tmp_path), engine_of(model)
    for info in quiet.adapters:
        busy.add_adapter(info.name, info.path, kind=info.kind)
    expected = [alone(quiet, request) for request in requests[0]]
    assert set(passes) == {1}
    generations = []
    for request in requests[4]:
        generations.append(busy.submit(request))
        busy.step()
    finish(busy)
    assert max(passes) > 1
    for generation, other in zip(generations, expected, strict=True):
        found = generation.result()
        assert (found.token_ids, found.finish_reason) == (other.token_ids, other.finish_reason)
        for entry, wanted in zip(found.logprobs, other.logprobs, strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_many_rows_are_not_slowed_down_by_guesses(passes):
    model = load("chatglm2")
    engine = engine_of(model)
    prompt = (5, 6, 7, 8) * 4
    sampling = Sampling(max_new_tokens=12, lookup_tokens=8)
    for _ in range(20):
        engine.submit(Request(prompt_ids=prompt, sampling=sampling))
    finish(engine)
    assert set(passes) == {1}
