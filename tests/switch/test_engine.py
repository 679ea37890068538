"""The request engine with switches: decided per row among others of all kinds, and evaluations' prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glmtune.adapter import load_adapter
from glmtune.errors import ConfigError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import load_prefix
from glmtune.switch.model import decide_prompts
from tests.inference.engine.cases import plain_generate, shared_prompts
from tests.inference.engine.requests import alone, engine_of, finish, load
from tests.switch.cases import dividing_switch, last_hidden, write_tuned

COUNT = 6
SAMPLING = Sampling(max_new_tokens=COUNT, logprobs=2)


def asked(prompt, adapter, **options):
    return Request(prompt_ids=tuple(prompt), sampling=SAMPLING, adapter=adapter, **options)


def assert_same(found, expected):
    assert found.token_ids == expected.token_ids
    for entry, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
def test_rows_run_as_the_base_or_with_their_adapter(name, tmp_path):
    model = load(name)
    prompts = shared_prompts(model.config)
    switch = dividing_switch(model, prompts)
    decided = switch.decide(last_hidden(model, prompts)).tolist()
    quiet = engine_of(model, reuse_caches=False)
    busy = engine_of(model, batch_size=7, piece_tokens=5, read_tokens=24)
    for kind in ("prefix", "lora"):
        folder = write_tuned(model, tmp_path / kind, kind, switch)
        quiet.add_adapter(kind, folder, kind=kind, use_switch=False)
        info = busy.add_adapter(kind, folder, kind=kind)
        assert info.switch == switch.facts
    generations, expected, wanted = [], [], []
    for place, prompt in enumerate(prompts * 2):
        kind, ignored = ("prefix", "lora", "")[place % 3], place % 5 == 4
        is_on = decided[place % len(prompts)]
        wanted.append(None if not kind or ignored else is_on)
        runs_as = kind if ignored or is_on else ""
        expected.append(alone(quiet, asked(prompt, runs_as)))
        generations.append(busy.submit(asked(prompt, kind, use_switch=not ignored)))
        busy.step()
    finish(busy)
    for generation, other, is_on in zip(generations, expected, wanted, strict=True):
        found = generation.result()
        assert_same(found, other)
        assert found.is_tuned is is_on
    counted = busy.stats().switched
    decisions = [each for each in wanted if each is not None]
    assert sum(on for on, _ in counted.values()) == sum(decisions) > 2
    assert sum(off for _, off in counted.values()) == len(decisions) - sum(decisions) > 2
    stats = busy.stats()
    assert stats.num_running == stats.num_waiting == stats.cache_tokens == 0


def test_strength_zero_is_the_base_without_a_question(tmp_path):
    model = load("chatglm2")
    prompt = shared_prompts(model.config)[2]
    switch = dividing_switch(model, shared_prompts(model.config))
    engine = engine_of(model)
    engine.add_adapter("prefix", write_tuned(model, tmp_path, "prefix", switch))
    found = alone(engine, asked(prompt, "prefix", strength=0.0))
    assert found.is_tuned is None
    assert engine.stats().switched == {}
    assert list(found.token_ids) == plain_generate(model, prompt, (), COUNT)


def test_a_conversation_reads_its_earlier_turns_once_with_either(tmp_path):
    """The base reads each question first: what it read of the last one is kept, and what the prefix read."""
    model = load("chatglm2")
    always = replace(dividing_switch(model, shared_prompts(model.config)), bias=1e6)
    engine = engine_of(model)
    engine.add_adapter("prefix", write_tuned(model, tmp_path, "prefix", always))
    first = [*range(5, 38), *range(5, 25)]
    answer = alone(engine, asked(first, "prefix"))
    assert answer.is_tuned
    again = alone(engine, asked([*first, *answer.token_ids, 8, 9, 6], "prefix"))
    assert again.num_cached_tokens >= len(first)
    quiet = engine_of(model, reuse_caches=False)
    quiet.add_adapter("prefix", tmp_path, use_switch=False)
    assert_same(again, alone(quiet, asked([*first, *answer.token_ids, 8, 9, 6], "prefix")))


@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_twins_that_come_together_do_not_take_each_others_keys(kind, tmp_path):
    """One question of the base waits for what a row reads that then leaves the base."""
    model = load("chatglm2")
    long = [*range(5, 40)] * 3
    switch = replace(dividing_switch(model, shared_prompts(model.config)), bias=1e6)
    folder = write_tuned(model, tmp_path, kind, switch)
    quiet, engine = engine_of(model, reuse_caches=False), engine_of(model, piece_tokens=40)
    quiet.add_adapter("tuned", folder, kind=kind, use_switch=False)
    engine.add_adapter("tuned", folder, kind=kind)
    requests = [asked([*long, 7], "tuned"), asked([*long, 9], ""), asked([*long, 8], "tuned")]
    generations = [engine.submit(request) for request in requests]
    finish(engine)
    for request, generation in zip(requests, generations, strict=True):
        assert_same(generation.result(), alone(quiet, request))


@pytest.mark.parametrize("kind", ["prefix", "lora"])
@pytest.mark.parametrize("name", ["chatglm", "glm4"])
def test_evaluations_over_a_model_with_something_attached(name, kind, tmp_path):
    base = load(name)
    prompts = shared_prompts(base.config)
    switch = dividing_switch(base, prompts)
    folder = write_tuned(base, tmp_path, kind, switch)
    candidates = [[5, 6, 7]] * len(prompts)

    def results(model):
        engine = Engine(model, EngineSettings(min_shared_gain=8))
        made = sorted(
            engine.complete(prompts, [Sampling(max_new_tokens=COUNT)] * len(prompts), stop_ids=()),
            key=lambda each: each.index,
        )
        scores = dict(engine.score_next(prompts, candidates))
        return made, [scores[place] for place in range(len(prompts))]

    bare, bare_scores = results(base)
    model = load(name)
    if kind == "lora":
        model = load_adapter(folder, model)
    else:
        attach_prefix(model, load_prefix(folder, model))
    found, found_scores = results(model)
    decided = decide_prompts(model, switch, [torch.tensor(prompt) for prompt in prompts]).tolist()
    inner = model.get_base_model() if kind == "lora" else model
    with pytest.raises(ConfigError, match="carries a prefix or LoRA with a switch"):
        engine_of(inner).submit(asked(prompts[0], ""))
    inner.use_switch = False
    tuned, tuned_scores = results(model)
    assert [each.is_tuned for each in found] == decided
    assert {each.is_tuned for each in (*tuned, *bare)} == {None}
    for place, is_on in enumerate(decided):
        assert found[place].token_ids == (tuned if is_on else bare)[place].token_ids
        same, other = (tuned_scores, bare_scores) if is_on else (bare_scores, tuned_scores)
        assert found_scores[place] == pytest.approx(same[place], abs=1e-4)
        assert max(abs(a - b) for a, b in zip(found_scores[place], other[place], strict=True)) > 1e-3
