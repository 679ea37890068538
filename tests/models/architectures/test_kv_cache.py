"""The cache of `generate`: it grows in place; INT8 codes, their error and memory, and who obeys the setting."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from glmtune.errors import ConfigError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.predict.run_identity import deciding_settings
from glmtune.inference.settings import EngineSettings, GenerationSettings
from glmtune.loading import load_base, load_model, load_tokenizer
from glmtune.models.architectures.kv_cache import GrowingLayer, Int8Cache, Int8Layer, Int8States

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"


def states(columns: int, *, rows: int = 2, seed: int = 0) -> torch.Tensor:
    """Keys with the outlying channels that rotary models have."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, 2, columns, 64, generator=generator)
    keys[..., 5] *= 8
    return keys


def test_codes_are_within_half_a_step_and_take_half_the_memory() -> None:
    keys = states(300).bfloat16()
    held = Int8States.empty(keys).grown(2, 300)
    held.write((slice(None), slice(None), slice(0, 300)), keys)
    found = held.read(2, 300)
    assert found.dtype == torch.bfloat16
    step = keys.float().abs().amax(-1, keepdim=True) / 127
    rounding = keys.float().abs() * 2**-8  # of the result to bfloat16
    assert ((found.float() - keys.float()).abs() <= step / 2 + rounding + 1e-6).all()
    signal, noise = keys.float().square().sum(), (found.float() - keys.float()).square().sum()
    assert 10 * torch.log10(signal / noise) > 37  # dB, with an outlier of 8 sigma in every token
    assert held.num_bytes == keys.nbytes * (64 + 4) / 128
    zeros = Int8States.empty(keys).grown(2, 4)
    zeros.write((slice(None), slice(None), slice(0, 4)), torch.zeros(2, 2, 4, 64))
    assert not zeros.read(2, 4).any()


def test_what_is_stored_does_not_depend_on_the_pieces_it_came_in() -> None:
    keys = states(200)
    whole, pieces = Int8Layer(), Int8Layer()
    expected = whole.update(keys, -keys)
    for start in (0, 1, 2, 70, 199):
        stop = {0: 1, 1: 2, 2: 70, 70: 199, 199: 200}[start]
        found = pieces.update(keys[:, :, start:stop], -keys[:, :, start:stop])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert pieces.get_seq_length() == 200


def test_copies_grow_apart_and_rows_are_picked() -> None:
    layer, keys = Int8Layer(), states(10)
    layer.update(keys, keys)
    twin = copy.copy(layer)
    ours, theirs = states(1, seed=1), states(1, seed=2)
    mine, other = layer.update(ours, ours)[0], twin.update(theirs, theirs)[0]
    torch.testing.assert_close(mine[:, :, 10:], ours, atol=0.2, rtol=0)
    torch.testing.assert_close(other[:, :, 10:], theirs, atol=0.2, rtol=0)
    layer.crop(-1)
    assert layer.get_seq_length() == 10
    layer.reorder_cache(torch.tensor([1, 1]))
    again = layer.update(ours, ours)[0]
    assert torch.equal(again[0, :, :10], again[1, :, :10])
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3, 3]))
    assert layer.update(ours[[0, 0, 1]], ours[[0, 0, 1]])[0].shape[0] == 3
    layer.reset()
    assert layer.get_seq_length() == 0


def prompt(model: Any, length: int) -> torch.Tensor:
    """Two rows of ids that the generation understands."""
    ids = torch.arange(6, 6 + length).repeat(2, 1)
    ids[1, : length // 2] += 3
    if hasattr(model.config, "gmask_token_id"):
        ids[:, -2:] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    return ids


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
def test_generate_grows_its_cache_in_place_and_writes_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_base(GOLDEN / name, dtype="float32", device="cpu")
    ids = prompt(model, 20)
    places: dict[int, list[tuple[int, int]]] = {}
    update = GrowingLayer.update

    def watched(layer: GrowingLayer, *given: Any, **options: Any) -> Any:
        keys, values = update(layer, *given, **options)
        places.setdefault(id(layer), []).append((keys.data_ptr(), values.data_ptr()))
        return keys, values

    monkeypatch.setattr(GrowingLayer, "update", watched)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 70}
    for settings in ({"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 3}):
        torch.manual_seed(0)
        ours = model.generate(ids, **settings, **options)
        seen = places.copy()
        torch.manual_seed(0)
        theirs = model.generate(ids, past_key_values=DynamicCache(), **settings, **options)
        assert places.keys() == seen.keys()  # a cache that was given is used as it is
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(*pair) for pair in zip(ours.logits, theirs.logits, strict=True))
        assert torch.equal(ours.past_key_values.layers[1].keys, theirs.past_key_values.layers[1].keys)
        assert len(seen) == model.config.num_hidden_layers
        if "num_beams" not in settings:  # beams change places, which is a copy
            assert {len(steps) for steps in seen.values()} == {70}
            assert {len(set(steps)) for steps in seen.values()} == {2}  # grown once, beyond 84 columns
        places.clear()


def test_generate_goes_on_from_a_cache_and_leaves_other_caches_alone() -> None:
    model: Any = load_base(GOLDEN / "chatglm2", dtype="float32", device="cpu")
    ids = prompt(model, 12)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(ids, max_new_tokens=9, **options).sequences
    first = model.generate(ids, max_new_tokens=4, **options)
    cache = first.past_key_values
    assert {type(layer) for layer in cache.layers} == {GrowingLayer}
    twin = copy.deepcopy(cache)
    for held in (cache, twin):
        again = model.generate(first.sequences, max_new_tokens=5, past_key_values=held, **options)
        assert torch.equal(again.sequences, whole)
        assert again.past_key_values is held
        assert held.get_seq_length() == 20
    looked_up = model.generate(ids[:1], max_new_tokens=9, prompt_lookup_num_tokens=3, **options).sequences
    assert torch.equal(looked_up, whole[:1])  # tries tokens and forgets them again
    fixed = model.generate(ids, max_new_tokens=9, cache_implementation="static", **options)
    assert torch.equal(fixed.sequences, whole)
    assert not isinstance(fixed.past_key_values.layers[0], GrowingLayer)
    assert model.generate(ids, max_new_tokens=9, use_cache=False, **options).past_key_values is None


def test_gradients_go_through_a_growing_layer_as_through_another() -> None:
    found, layers = [], (GrowingLayer(), DynamicLayer())
    for layer in layers:
        pieces = [states(3, seed=seed).requires_grad_() for seed in range(3)]
        total = torch.zeros(())
        for piece in pieces:
            keys, values = layer.update(piece, 2 * piece)
            total = total + (keys * values).square().sum()
        found.append(torch.autograd.grad(total, pieces))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_forgetting_takes_no_new_memory_unless_a_copy_remembers() -> None:
    layer: Any = GrowingLayer()
    keys = states(10)
    assert layer.keys is None
    place = layer.update(keys, keys)[0].data_ptr()
    layer.crop(-3)
    assert layer.update(keys[:, :, 7:], keys[:, :, 7:])[0].data_ptr() == place
    twin = copy.copy(layer)
    layer.crop(-3)
    found, _ = layer.update(-keys[:, :, 7:], keys[:, :, 7:])
    assert found.data_ptr() != place
    assert torch.equal(twin.keys, keys)
    assert torch.equal(found[:, :, 7:], -keys[:, :, 7:])


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
def test_logits_with_it_are_near_those_without(name: str) -> None:
    model: Any = load_base(GOLDEN / name, dtype="float32", device="cpu")
    ids = torch.arange(6, 46)[None]
    if hasattr(model.config, "gmask_token_id"):
        ids[0, 36:38] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    results = []
    for cache in (DynamicCache(), Int8Cache()):
        with torch.no_grad():
            options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "output_scores": True}
            options |= {"past_key_values": cache, "return_dict_in_generate": True, "eos_token_id": None}
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        results.append(torch.stack(found.scores).float())
    difference = (results[0][0] - results[1][0]).abs().max() / results[0][0].std()
    assert 0 < difference < 0.05


def test_predict_chat_and_the_engine_obey_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model("glm-tiny", device="cpu", dtype="float32")
    tokenizer: Any = load_tokenizer("glm-tiny")
    used = []
    write = Int8States.write
    monkeypatch.setattr(Int8States, "write", lambda self, *given: (used.append(1), write(self, *given))[1])
    prompts = [tokenizer.encode(text) for text in ("3+5=", "12+30=", "你好", "9")]
    stop = [tokenizer.eos_token_id]

    def predicted(**settings: Any) -> list[tuple[int, ...]]:
        chosen = GenerationSettings(max_new_tokens=8, **settings)
        answers = generate_ids(model, prompts, chosen, stop_ids=stop, pad_id=tokenizer.pad_token_id)
        return [answer.token_ids for answer in sorted(answers, key=lambda answer: answer.index)]

    def evaluated(**settings: Any) -> list[tuple[int, ...]]:
        engine = Engine(model, EngineSettings(batch_size=2, **settings))
        texts = engine.generate(prompts, max_new_tokens=8, stop_ids=stop, decode=tokenizer.decode)
        return [text.token_ids for text in sorted(texts, key=lambda text: text.index)]

    def chatted(**settings: Any) -> list[Any]:
        one = model.chat(tokenizer, "3+5", max_new_tokens=8, do_sample=False, **settings)[0]
        two = list(model.stream_chat(tokenizer, "3+5", max_new_tokens=8, do_sample=False, **settings))[-1][0]
        return [one, two]

    for run in (predicted, evaluated, chatted):
        plain = run()
        assert not used
        near = run(kv_cache="int8")
        assert used
        used.clear()
        assert sum(a == b for a, b in zip(plain, near, strict=True)) >= len(plain) - 1  # a small error
    assert predicted(num_beams=2, kv_cache="int8")
    assert used


def test_a_conversation_goes_on_in_the_cache_it_began_with() -> None:
    model: Any = load_model("glm-tiny", device="cpu")
    tokenizer = load_tokenizer("glm-tiny")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_past_key_values": True}
    for kind, other in (("int8", "plain"), ("plain", "int8")):
        _, history, cache = list(model.stream_chat(tokenizer, "3+5", kv_cache=kind, **options))[-1]
        options["past_key_values"] = cache
        again = list(model.stream_chat(tokenizer, "4+4", history, **options))[-1][2]
        assert again.kv_cache == kind
        assert type(again.layers[0]) is {"int8": Int8Layer, "plain": GrowingLayer}[kind]
        if other == "int8":
            with pytest.raises(ConfigError, match=r"`kv_cache` is `int8`, but .* was begun with `plain`"):
                next(model.stream_chat(tokenizer, "4+4", history, kv_cache=other, **options))
        del options["past_key_values"]


def test_names_and_identities() -> None:
    with pytest.raises(ConfigError, match=r"`generation.kv_cache` is `int7`.*int8"):
        GenerationSettings(kv_cache="int7")
    with pytest.raises(ConfigError, match=r"`engine.kv_cache` is `fp8`"):
        EngineSettings(kv_cache="fp8")
    model: Any = load_model("glm-tiny", device="cpu")
    with pytest.raises(ConfigError, match=r"`kv_cache` is `int7`"):
        model.chat(load_tokenizer("glm-tiny"), "3+5", kv_cache="int7")
    assert deciding_settings(GenerationSettings(kv_cache="int8")) != deciding_settings(GenerationSettings())
    assert "kv_cache" not in deciding_settings(GenerationSettings())  # earlier runs can go on
    from evaluation.backends.glm import GlmBackend

    tokenizer = load_tokenizer("glm-tiny")
    backends = [
        GlmBackend(model, tokenizer, settings=EngineSettings(kv_cache=kind)) for kind in ("plain", "int8")
    ]
    assert backends[0].identity.engine == "glmtune"
    assert backends[1].identity.engine == "glmtune, int8 kv_cache"
