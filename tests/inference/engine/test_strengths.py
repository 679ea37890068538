"""Scales of LoRAs per request, and prefixes that are attached to the model with a strength."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glmtune.errors import ConfigError
from glmtune.inference.engine.adapters import MAX_STRENGTHS
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.loading import load_model, load_tuned
from glmtune.models.load import load_official
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import load_prefix
from tests.inference.engine.cases import plain_generate, shared_prompts
from tests.inference.engine.requests import alone, engine_of, finish, load, write_lora, write_prefix

SCALES = (0.0, 0.5, 1.0, 2.0)


def add_by_hand(model: Any, folder: Path, scale: float) -> Any:
    """Add scale * (alpha / rank) * B * A to the weights, from the files and without PEFT."""
    config = json.loads((folder / "adapter_config.json").read_text())
    matrices = load_file(folder / "adapter_model.safetensors")
    factor = scale * config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for key, down in matrices.items():
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                up = matrices[key.replace("lora_A", "lora_B")]
                model.get_submodule(name).weight += factor * up @ down
    return model


def ask(prompt: list[int], adapter: str = "", strength: float = 1.0, **more: Any) -> Request:
    settings: dict[str, Any] = {"max_new_tokens": 10, **more}
    sampling = Sampling(**settings)
    return Request(prompt_ids=tuple(prompt), sampling=sampling, adapter=adapter, strength=strength)


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_a_batch_of_several_scales_is_the_model_with_weights_scaled_by_hand(
    name: str, tmp_path: Path
) -> None:
    model = load(name)
    engine = engine_of(model, reuse_caches=False)
    write_lora(model, tmp_path / "lora", seed=3)
    engine.add_adapter("lora", tmp_path / "lora", kind="lora")
    engine.add_adapter("other", write_lora(model, tmp_path / "other", seed=4), kind="lora")
    prompts = shared_prompts(model.config)[:2]
    generations = {}
    for prompt in prompts:  # all run at once, beside the base and another LoRA
        for scale in SCALES:
            generations[str(prompt), scale] = engine.submit(ask(prompt, "lora", scale))
        generations[str(prompt), "base"] = engine.submit(ask(prompt))
        generations[str(prompt), "other"] = engine.submit(ask(prompt, "other", 0.5))
    finish(engine)
    found = {key: list(generation.result().token_ids) for key, generation in generations.items()}
    for scale in SCALES:
        by_hand = add_by_hand(load(name), tmp_path / "lora", scale)
        for prompt in prompts:
            assert found[str(prompt), scale] == plain_generate(by_hand, prompt, (), 10), scale
    first = str(prompts[0])
    assert found[first, 0.0] == found[first, "base"]
    assert len({str(found[first, scale]) for scale in SCALES}) == 4
    halved = add_by_hand(load(name), tmp_path / "other", 0.5)
    assert found[first, "other"] == plain_generate(halved, prompts[0], (), 10)


def test_scale_0_is_the_base_to_the_bit(tmp_path: Path) -> None:
    model = load("chatglm2")
    engine = engine_of(model, reuse_caches=False)
    engine.add_adapter("lora", write_lora(model, tmp_path / "lora", seed=3), kind="lora")
    prompt = shared_prompts(model.config)[1]
    base, none, half = (
        alone(engine, ask(prompt, name, strength, logprobs=3))
        for name, strength in (("", 1.0), ("lora", 0.0), ("lora", 0.5))
    )
    assert [entry.logprob for entry in none.logprobs] == [entry.logprob for entry in base.logprobs]
    assert [entry.logprob for entry in half.logprobs] != [entry.logprob for entry in base.logprobs]


def test_what_one_scale_read_is_of_no_use_to_another(tmp_path: Path) -> None:
    model = load("chatglm2")
    engine = engine_of(model)
    engine.add_adapter("lora", write_lora(model, tmp_path / "lora", seed=3), kind="lora")
    prompt = shared_prompts(model.config)[3]
    cached = [
        alone(engine, ask(prompt, "lora", scale)).num_cached_tokens for scale in (1.0, 0.5, 0.0, 0.5, 0.0)
    ]
    assert cached == [0, 0, 0, len(prompt) - 1, len(prompt) - 1]


def test_more_scales_than_are_remembered_run_all_the_same(tmp_path: Path) -> None:
    model = load("chatglm2")
    engine = engine_of(model, reuse_caches=False)
    engine.add_adapter("lora", write_lora(model, tmp_path / "lora", seed=3), kind="lora")
    prompt = shared_prompts(model.config)[0]
    expected = list(alone(engine, ask(prompt, "lora", 0.5)).token_ids)
    running = engine.submit(ask(prompt, "lora", 0.5))
    engine.step()
    for place in range(MAX_STRENGTHS + 2):
        engine.submit(ask(prompt, "lora", 1.0 + place))
    late = engine.submit(ask(prompt, "lora", 0.5))
    finish(engine)
    assert list(running.result().token_ids) == list(late.result().token_ids) == expected


@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
def test_what_is_no_scale_is_refused(scale: float, tmp_path: Path) -> None:
    model = load("chatglm2")
    engine = engine_of(model)
    engine.add_adapter("lora", write_lora(model, tmp_path / "lora", seed=3), kind="lora")
    with pytest.raises(ConfigError, match=r"scale of LoRA `lora` is .*at least 0 and finite"):
        engine.submit(ask([5, 6, 7], "lora", scale))
    assert engine.stats().num_waiting == 0


@pytest.mark.parametrize("folder", ["v2/int4", "v1/int8"])
def test_scales_over_codes(oracles: Path, folder: str, tmp_path: Path) -> None:
    plain = load_official(oracles / folder[:2] / "checkpoint_safetensors", dtype="float32", device="cpu")
    write_lora(plain, tmp_path / "lora", seed=3)
    prompt = shared_prompts(plain.config)[3]
    engine = engine_of(load_model(oracles / folder, dtype="float32", device="cpu"))
    engine.add_adapter("lora", tmp_path / "lora", kind="lora")
    found = []
    for scale in (0.0, 0.5, 2.0):
        options: dict[str, Any] = {"adapter": tmp_path / "lora", "adapter_scale": scale, "dtype": "float32"}
        tuned = load_tuned(oracles / folder, device="cpu", **options)
        found.append(list(alone(engine, ask(prompt, "lora", scale)).token_ids))
        assert found[-1] == plain_generate(tuned, prompt, (), 10), scale
    assert found[0] == list(alone(engine, ask(prompt)).token_ids)
    assert found[1] != found[2]


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_an_attached_prefix_keeps_its_strength(name: str, tmp_path: Path) -> None:
    """Read, stepped, and shared prompts: the engine sees the strength that the model was loaded with."""
    model = load(name)
    prefix = load_prefix(write_prefix(model, tmp_path / "prefix", seed=1, length=4), model)
    prompts = shared_prompts(model.config)[:4]
    found = {}
    for strength in (0.0, 0.3, 1.0):
        attach_prefix(model, prefix, strength=strength)
        engine = engine_of(model, min_shared_gain=1)
        samplings = [Sampling(max_new_tokens=8)] * len(prompts)
        made = sorted(engine.complete(prompts, samplings, stop_ids=()), key=lambda each: each.index)
        found[strength] = [list(each.token_ids) for each in made]
        assert found[strength] == [plain_generate(model, prompt, (), 8) for prompt in prompts], strength
        one = alone(engine_of(model), ask(prompts[0], max_new_tokens=8))
        assert list(one.token_ids) == found[strength][0]
    assert len({str(each) for each in found.values()}) == 3
