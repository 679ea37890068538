"""A request gives the same answer alone and among others of all kinds, whatever joins and leaves meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmtune.adapter.load import load_adapter
from glmtune.errors import CheckpointError, ConfigError
from glmtune.inference.engine.batching import drafting
from glmtune.inference.requests.engine_state import NoSuchAdapterError
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.loading import load_model, load_tuned
from glmtune.models.load import load_official
from glmtune.prefix.attach import attach_prefix, detach_prefix
from glmtune.prefix.checkpoint import load_prefix
from tests.inference.engine.cases import FAMILIES, ORACLES, plain_generate, shared_prompts
from tests.inference.engine.requests import (
    STOP,
    alone,
    engine_of,
    finish,
    load,
    mixed_requests,
    write_lora,
    write_prefix,
)


def check_mixed(model, folder: Path):
    """Compare each request of a busy engine that drafts with that alone, read whole, nothing kept or drafted."""
    requests = mixed_requests(model)
    quiet = engine_of(model, folder, reuse_caches=False)
    expected = [alone(quiet, request) for request in requests]
    busy = engine_of(model, batch_size=7, piece_tokens=5, read_tokens=24, prompt_lookup_tokens=6)
    for info in quiet.adapters:
        busy.add_adapter(info.name, info.path, kind=info.kind)
    generations = []
    for request in requests:  # a few steps between: they join while others are read, run, and leave
        generations.append(busy.submit(request))
        busy.step()
        busy.step()
    finish(busy)
    for request, generation, alone_result in zip(requests, generations, expected, strict=True):
        found = generation.result()
        assert found.token_ids == alone_result.token_ids, request
        assert found.finish_reason == alone_result.finish_reason
        for entry, other in zip(found.logprobs, alone_result.logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert busy.stats().num_accepted_tokens > 0
    assert busy.stats().num_running == busy.stats().num_waiting == busy.stats().cache_tokens == 0
    return requests, expected


@pytest.fixture(autouse=True)
def drafts_whatever_they_cost(monkeypatch):
    monkeypatch.setitem(drafting.TOKEN_COST, "cpu", 0.0)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_generation(name, tmp_path):
    requests, expected = check_mixed(load(name), tmp_path)
    adapters = {request.adapter for request in requests}
    assert adapters == {"", "short", "long", "gated", "gated-b", "lora-a", "lora-b"}
    assert len({result.token_ids for result in expected}) > 6


@pytest.mark.parametrize("folder", ORACLES)
def test_oracle_checkpoints(oracles: Path, folder, tmp_path):
    model = load_official(oracles / folder, dtype="float32", device="cpu")
    _, expected = check_mixed(model, tmp_path)
    assert len({result.token_ids for result in expected}) > 3


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
def test_adapters_give_what_they_give_attached_to_the_model(name, tmp_path):
    model = load(name)
    engine = engine_of(model, tmp_path)
    prompts = shared_prompts(model.config)[:3]

    def asked(adapter: str, strength: float = 1.0) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=10)
        found = [
            alone(
                engine,
                Request(prompt_ids=tuple(prompt), sampling=sampling, adapter=adapter, strength=strength),
            )
            for prompt in prompts
        ]
        return [list(each.token_ids) for each in found]

    base = [plain_generate(model, prompt, (), 10) for prompt in prompts]
    assert asked("") == base
    assert asked("short", 0.0) == base
    adapted = load(name)
    attach_prefix(adapted, load_prefix(tmp_path / "short", adapted))
    with_prefix = [plain_generate(adapted, prompt, (), 10) for prompt in prompts]
    assert asked("short") == with_prefix
    detach_prefix(adapted)
    with_lora = load_adapter(tmp_path / "lora-a", adapted)
    assert asked("lora-a") == [plain_generate(with_lora, prompt, (), 10) for prompt in prompts]
    assert asked("") == base  # the model is as it was, also after passes of a LoRA
    assert len({str(base), str(with_prefix), str(asked("lora-a")), str(asked("long"))}) >= 3


def test_a_strength_adds_its_log_to_the_scores_of_the_prefix(tmp_path):
    """Strength 2 is the same as the prefix standing there twice: each of its weights counts double."""
    from glmtune.prefix.checkpoint import save_prefix
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

    model = load("chatglm2")
    engine = engine_of(model)
    once = load_prefix(write_prefix(model, tmp_path / "once", seed=1, length=4), model)
    twice = PrefixEncoder(prefix_shape(model.config), pre_seq_len=8)
    twice.load_state_dict({"embedding.weight": once.embedding.weight.detach().repeat(2, 1)})
    engine.add_adapter("once", tmp_path / "once")
    engine.add_adapter("twice", save_prefix(twice, tmp_path / "twice"))
    for prompt in shared_prompts(model.config)[:4]:
        results = [
            alone(
                engine,
                Request(
                    prompt_ids=tuple(prompt),
                    sampling=Sampling(max_new_tokens=8, logprobs=3),
                    adapter=name,
                    strength=strength,
                ),
            )
            for name, strength in (("once", 2.0), ("twice", 1.0))
        ]
        assert results[0].token_ids == results[1].token_ids
        for first, second in zip(results[0].logprobs, results[1].logprobs, strict=True):
            assert first.logprob == pytest.approx(second.logprob, abs=1e-4)


@pytest.mark.parametrize("folder", ["v2/int4", "v1/int8"])
def test_over_codes_that_are_prepared_for_inference(oracles: Path, folder, tmp_path):
    """Their weights are placeholders, on which PEFT would lose what it loads without a word."""
    plain = load_official(oracles / folder[:2] / "checkpoint_safetensors", dtype="float32", device="cpu")
    write_lora(plain, tmp_path / "lora", seed=3)
    write_prefix(plain, tmp_path / "prefix", seed=3, length=4)
    prompt = shared_prompts(plain.config)[3]
    tuned = load_tuned(oracles / folder, adapter=tmp_path / "lora", dtype="float32", device="cpu")
    with_lora = plain_generate(tuned, prompt, (), 8)
    engine = engine_of(load_model(oracles / folder, dtype="float32", device="cpu"))
    engine.add_adapter("lora", tmp_path / "lora", kind="lora")
    engine.add_adapter("prefix", tmp_path / "prefix")
    found = {
        name: alone(
            engine,
            Request(prompt_ids=tuple(prompt), sampling=Sampling(max_new_tokens=8), adapter=name),
        )
        for name in ("lora", "prefix", "")
    }
    assert list(found["lora"].token_ids) == with_lora
    assert len({result.token_ids for result in found.values()}) == 3


def test_a_lora_leaves_the_model_as_it_was(tmp_path):
    model = load("chatglm2")
    names = [name for name, _ in model.named_modules()]
    trained = [weight.requires_grad for weight in model.parameters()]
    engine = engine_of(model)
    engine.add_adapter("a", write_lora(model, tmp_path / "a", seed=3), kind="lora")
    assert [name for name, _ in model.named_modules()] == names
    assert [weight.requires_grad for weight in model.parameters()] == trained
    assert not hasattr(model, "peft_config")


def test_what_does_not_belong_to_the_model_is_refused_with_its_file(tmp_path):
    model, other = load("chatglm2"), load("chatglm")
    engine = engine_of(model)
    write_prefix(other, tmp_path / "prefix", seed=1, length=3)
    write_lora(other, tmp_path / "lora", seed=1)
    with pytest.raises(CheckpointError, match=r"prefix_encoder\.safetensors"):
        engine.add_adapter("wrong", tmp_path / "prefix")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not fit"):
        engine.add_adapter("wrong", tmp_path / "lora", kind="lora")
    assert engine.adapters == ()
    assert not hasattr(model, "peft_config")
    prompt = tuple(shared_prompts(model.config)[0])
    request = Request(prompt_ids=prompt, sampling=Sampling(max_new_tokens=6))
    assert list(alone(engine, request).token_ids) == plain_generate(model, list(prompt), (), 6)


def test_a_removed_adapter_finishes_what_runs(tmp_path):
    model = load("chatglm2")
    engine = engine_of(model, tmp_path)
    request = Request(
        prompt_ids=tuple(shared_prompts(model.config)[0]),
        sampling=Sampling(max_new_tokens=10),
        adapter="short",
    )
    expected = alone(engine, request)
    generation = engine.submit(request)
    engine.step()
    engine.remove_adapter("short")
    finish(engine)
    assert generation.result().token_ids == expected.token_ids
    with pytest.raises(NoSuchAdapterError, match=r"`short`.*Valid: long, gated, gated-b, lora-a, lora-b"):
        engine.submit(request)
    with pytest.raises(NoSuchAdapterError, match="short"):
        engine.remove_adapter("short")
    engine.add_adapter("short", tmp_path / "short")
    found = alone(engine, request)
    assert found.token_ids == expected.token_ids
    assert found.num_cached_tokens > 0  # by what it holds, not by its name


def test_names_and_strengths_are_checked(tmp_path):
    model = load("chatglm2")
    engine = engine_of(model, tmp_path)
    prompt = tuple(shared_prompts(model.config)[0])
    with pytest.raises(ConfigError, match="`short` is the name of an adapter already"):
        engine.add_adapter("short", tmp_path / "long")
    with pytest.raises(ConfigError, match="no name"):
        engine.add_adapter("", tmp_path / "long")
    with pytest.raises(ConfigError, match=r"strength of prefix `short` is -1"):
        engine.submit(Request(prompt_ids=prompt, adapter="short", strength=-1.0))
    assert engine.stats().num_waiting == 0


def test_a_prefix_that_is_attached_leaves_no_place_for_others(tmp_path):
    model = load("chatglm2")
    file = write_prefix(model, tmp_path / "prefix", seed=1, length=3)
    attach_prefix(model, load_prefix(file, model))
    engine = engine_of(model)
    with pytest.raises(ConfigError, match="another one is attached to the model"):
        engine.add_adapter("more", file)
    prompt = shared_prompts(model.config)[0]
    request = Request(prompt_ids=tuple(prompt), sampling=Sampling(max_new_tokens=6), stop_ids=STOP)
    expected = plain_generate(model, prompt, tuple(STOP), 6)
    found = list(alone(engine, request).token_ids)
    assert found == [token for token in expected if token not in STOP]


def test_damaged_logits_fail_their_row_alone(monkeypatch):
    model = load("chatglm2")
    engine = engine_of(model)
    real = type(engine._model).unchecked_logits
    requests = [
        Request(prompt_ids=tuple(prompt), sampling=Sampling(max_new_tokens=8))
        for prompt in shared_prompts(model.config)[:3]
    ]
    expected = [alone(engine, request) for request in requests]

    def damaged(self, hidden):
        logits = real(self, hidden)
        if len(logits) == 3:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(type(engine._model), "unchecked_logits", damaged)
    generations = [engine.submit(request) for request in requests]
    finish(engine)
    with pytest.raises(Exception, match="not finite"):
        generations[1].result()
    for place in (0, 2):
        assert generations[place].result().token_ids == expected[place].token_ids
