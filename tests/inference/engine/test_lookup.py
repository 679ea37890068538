"""Drafted tokens change no answer, only how many passes it takes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from glmtune.inference.engine import model as engine_model
from glmtune.inference.engine.batching import drafting
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.loading import load_model, load_tokenizer
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels.native import native_library
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
def test_the_answer_is_that_without_drafts(name, passes):
    model = load(name)
    engine = engine_of(model, reuse_caches=False, prompt_lookup_tokens=6)
    for prompt in shared_prompts(model.config)[:5]:
        sampling = Sampling(max_new_tokens=40)
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
    requests = [
        Request(
            prompt_ids=tuple(prompts[place % len(prompts)]),
            sampling=Sampling(**kinds[place % len(kinds)]),
            stop_ids=STOP,
            adapter=adapters[place % len(adapters)],
        )
        for place in range(12)
    ]
    quiet, busy = engine_of(model, tmp_path), engine_of(model, prompt_lookup_tokens=4)
    for info in quiet.adapters:
        busy.add_adapter(info.name, info.path, kind=info.kind)
    expected = [alone(quiet, request) for request in requests]
    assert set(passes) == {1}
    generations = []
    for request in requests:
        generations.append(busy.submit(request))
        busy.step()
    finish(busy)
    assert max(passes) > 1
    for generation, other in zip(generations, expected, strict=True):
        found = generation.result()
        assert (found.token_ids, found.finish_reason) == (other.token_ids, other.finish_reason)
        for entry, wanted in zip(found.logprobs, other.logprobs, strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_sampled_answers_are_those_without_drafts(passes):
    """A token is drawn from what the model says, with the random number that is its own, draft or not."""
    model = load("chatglm2")
    found = []
    for most in (0, 8):
        engine = engine_of(model, reuse_caches=False, prompt_lookup_tokens=most)
        sampling = Sampling(max_new_tokens=60, temperature=0.3, top_k=4, seed=11, presence_penalty=0.1)
        asked = [
            Request(prompt_ids=tuple(prompt) * 3, sampling=sampling)
            for prompt in shared_prompts(model.config)[:4]
        ]
        found.append([alone(engine, request).token_ids for request in asked])
    assert found[0] == found[1]
    assert max(passes) > 1
    assert engine.stats().num_accepted_tokens > 3


def test_many_rows_are_not_slowed_down_by_drafts(passes):
    """With 20 rows a pass of two tokens each has 40, which costs nearly twice as much as one of 20."""
    model = load("chatglm2")
    engine = engine_of(model, prompt_lookup_tokens=8)
    source = random.Random(1)
    for _ in range(20):
        prompt = tuple(source.choices((5, 6, 7), k=30))  # every pair occurs; what follows is chance
        engine.submit(Request(prompt_ids=prompt, sampling=Sampling(max_new_tokens=12, temperature=9.0)))
    finish(engine)
    # Wrong ones are dropped after a few tries; rows that are left at the end may draft again.
    assert sum(count for size, count in passes.items() if size > 1) <= passes[1]


def test_answers_to_many_prompts_are_looked_up_too_and_those_of_requests_are_not(monkeypatch):
    """Prompts of one token give nothing to look up, but each is answered like the one before it."""
    monkeypatch.setitem(drafting.TOKEN_COST, "cpu", 0.0)
    model = load("chatglm2")
    prompts, sampling = [[5], [5], [5]], Sampling(max_new_tokens=8)
    engine = engine_of(model, batch_size=1, reuse_caches=False, prompt_lookup_tokens=7)
    made = sorted(engine.complete(prompts, [sampling] * 3, stop_ids=()), key=lambda each: each.index)
    expected = plain_generate(model, [5], (), 8)
    assert [list(each.token_ids) for each in made] == [expected] * 3
    first, second, third = (each.num_accepted_tokens for each in made)
    assert second > first
    assert third > first
    for _ in range(3):
        alone(engine, Request(prompt_ids=(5,), sampling=sampling))
    assert engine.stats().num_accepted_tokens == 3 * first


def test_what_was_drafted_is_counted():
    model = load("chatglm2")
    engine = engine_of(model, reuse_caches=False, prompt_lookup_tokens=6)
    prompt = shared_prompts(model.config)[0]
    made = list(engine.complete([prompt], [Sampling(max_new_tokens=40)], stop_ids=()))
    assert made[0].num_draft_tokens >= made[0].num_accepted_tokens > 3
    quiet = list(engine_of(model).complete([prompt], [Sampling(max_new_tokens=40)], stop_ids=()))
    assert (quiet[0].num_draft_tokens, quiet[0].num_accepted_tokens) == (0, 0)
    assert made[0].token_ids == quiet[0].token_ids


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("quantization", ["int4", "int8", "int4-g32", None])
def test_on_cpus_with_the_compiled_products_not_a_bit_changes(quantization, activations, monkeypatch):
    """In 16 bits scores tie, so answers would soon differ if a pass of several tokens computed otherwise."""
    if quantization is None and activations is not None:
        pytest.skip("activations are rounded for layers of codes alone")
    if native_library().refusal:
        pytest.skip(native_library().refusal)
    monkeypatch.setitem(drafting.TOKEN_COST, "cpu", 0.0)  # as long as may be
    model = load_model("glm-tiny", quantization=quantization, dtype="bfloat16", device="cpu")
    prepare_for_inference(model, activations=activations)
    text = "鸡蛋三元一斤，买四斤要几元？三乘以四等于十二，十二元。鸡蛋三元一斤，买五斤要几元？"
    prompt = load_tokenizer("glm-tiny").encode(text)
    answers = []
    for most in (0, 7):
        engine = engine_of(model, reuse_caches=False, prompt_lookup_tokens=most)
        sampling = Sampling(max_new_tokens=120, ignore_eos=True, logprobs=3)
        answers.append(alone(engine, Request(prompt_ids=tuple(prompt), sampling=sampling)))
    assert engine.stats().num_accepted_tokens > 20
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].logprobs == answers[1].logprobs  # to the last bit
