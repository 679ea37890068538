"""Generation in token ids on a tiny random model."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.predict import beams
from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import GenerationSettings

STOP, PAD = (7, 9), 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, eos_token_id=7,
        initializer_range=0.3,
    )  # fmt: skip
    return GlmForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts():
    source = torch.Generator().manual_seed(1)
    lengths = [3, 17, 9, 1, 24, 9, 12, 5, 20, 2, 15]
    return [torch.randint(10, 48, (length,), generator=source).tolist() for length in lengths]


def answers(model, prompts, *, rows=None, **settings):
    made = generate_ids(
        model,
        prompts,
        GenerationSettings(**{"max_new_tokens": 16, **settings}),
        stop_ids=STOP,
        pad_id=PAD,
        rows=rows,
    )
    return {answer.index: answer for answer in made}


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.3},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
    "sampling everything": {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 2.0},
}


@pytest.mark.parametrize("mode", MODES)
def test_answers_do_not_depend_on_the_batch_size(model, prompts, mode):
    alone = answers(model, prompts, batch_size=1, **MODES[mode])
    together = answers(model, prompts, **MODES[mode])
    assert together == alone
    assert sorted(together) == list(range(len(prompts)))


def test_greedy_equals_a_plain_loop(model, prompts):
    made = answers(model, prompts)
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(16):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in STOP:
                break
        ended = ids[-1] in STOP
        assert made[index].token_ids == tuple(ids[len(prompt) : len(ids) - ended])
        assert made[index].stop_reason == ("eos" if ended else "length")
        assert made[index].num_new_tokens == len(ids) - len(prompt)
        assert made[index].num_prompt_tokens == len(prompt)


def test_both_stop_reasons_occur_and_no_stop_token_is_left(model, prompts):
    made = answers(model, prompts, do_sample=True, temperature=3.0, top_p=1.0, top_k=0, max_new_tokens=40)
    assert {answer.stop_reason for answer in made.values()} == {"eos", "length"}
    assert not any(set(STOP) & set(answer.token_ids) for answer in made.values())


@pytest.mark.parametrize("num_beams", [1, 2])
def test_padding_token_that_may_be_emitted_is_not_penalized(model, prompts, num_beams):
    values = {"repetition_penalty": 1.5, "max_new_tokens": 8, "num_beams": num_beams}
    settings, single = GenerationSettings(**values), GenerationSettings(**values, batch_size=1)
    together = {a.index: a for a in generate_ids(model, prompts, settings, stop_ids=STOP, pad_id=7)}
    assert together == {a.index: a for a in generate_ids(model, prompts, single, stop_ids=STOP, pad_id=7)}


def test_sampling_is_fixed_by_seed_and_row_not_by_place(model, prompts):
    mode = {"do_sample": True, "temperature": 2.0, "top_p": 1.0, "top_k": 0}
    whole = answers(model, prompts, **mode)
    picked = [6, 2, 9]
    part = answers(model, [prompts[i] for i in picked], rows=picked, **mode)
    assert [part[i].token_ids for i in range(3)] == [whole[i].token_ids for i in picked]
    assert answers(model, prompts, seed=1, **mode) != whole
    twins = answers(model, [prompts[0]] * 2, **mode)
    assert twins[0].token_ids != twins[1].token_ids
    neighbours = answers(model, [prompts[0]], rows=[1], seed=41, **mode)
    assert neighbours[0].token_ids != answers(model, [prompts[0]], rows=[0], seed=42, **mode)[0].token_ids


@pytest.mark.parametrize(
    "values", [{}, {"top_k": 0, "top_p": 1.0}, {"temperature": 3.0, "top_k": 7, "top_p": 0.5}]
)
def test_tokens_are_drawn_as_often_as_transformers_would_draw_them(model, prompts, values):
    """The next token of one prompt, of many rows, against the probabilities of transformers' own warpers."""
    settings = GenerationSettings(do_sample=True, max_new_tokens=1, **values)
    temperature, top_k, top_p = settings.sampling
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    with torch.no_grad():
        scores = model(torch.tensor([prompts[4]])).logits[:, -1]
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0]
    rows = 4000
    made = answers(model, [prompts[4]] * rows, max_new_tokens=1, batch_size=1000, do_sample=True, **values)
    chosen = [answer.token_ids[0] for answer in made.values() if answer.token_ids]
    counts = torch.bincount(torch.tensor(chosen), minlength=48) / rows
    counts[list(STOP)] = expected[list(STOP)]  # these end the answer and are no part of it
    assert len(chosen) == pytest.approx(rows * float(1 - expected[list(STOP)].sum()), abs=5 * rows**0.5)
    assert float((counts - expected).abs().max()) < 5 * 0.5 / rows**0.5  # five standard deviations
    assert not counts[expected == 0].any()


def test_the_penalty_is_that_of_transformers(model, prompts):
    made = answers(model, prompts, repetition_penalty=1.4)
    for index, prompt in enumerate(prompts):
        found = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=16, repetition_penalty=1.4,
            eos_token_id=list(STOP), pad_token_id=PAD,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert made[index].token_ids == tuple(token for token in found if token not in STOP)


def test_longest_prompts_come_first_and_rows_keep_to_the_budget(model, prompts, monkeypatch):
    sizes, real = [], EngineModel.read

    def spy(self, parts, *rest, **keywords):
        sizes.append([len(part) for part in parts])
        return real(self, parts, *rest, **keywords)

    monkeypatch.setattr(EngineModel, "read", spy)
    answers(model, prompts, max_batch_tokens=120)
    assert sizes[0] == [24, 20, 17]  # each may grow by 16 tokens, and a fourth had no room
    assert [length for part in sizes for length in part] == sorted(map(len, prompts), reverse=True)
    sizes.clear()
    answers(model, prompts, max_batch_tokens=1, batch_size=4)
    assert [len(part) for part in sizes] == [1] * len(prompts)


def test_answers_come_as_they_end(model, prompts):
    settings = GenerationSettings(max_new_tokens=64, batch_size=2)
    stream = generate_ids(model, prompts, settings, stop_ids=STOP, pad_id=PAD)
    first = next(stream)
    stream.close()
    assert first.stop_reason == "eos"  # the first to end, while others go on to their limit
    assert first.num_new_tokens < 64


MEMORY_ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 5 bytes")]


@pytest.mark.parametrize("error", MEMORY_ERRORS)
@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_out_of_memory_halves_the_rows_and_goes_on(model, prompts, monkeypatch, caplog, error, mode):
    tried, real = [], EngineModel.step

    def scarce(self, tokens, *rest):
        tried.append(len(tokens))
        if len(tokens) > 3:
            raise error
        return real(self, tokens, *rest)

    expected = answers(model, prompts, **MODES[mode])
    monkeypatch.setattr(EngineModel, "step", scarce)
    assert answers(model, prompts, **MODES[mode]) == expected
    most = tried[0]  # without those that ended with their first token
    assert most >= 9
    assert [size for size in tried if size > 3] == [most, most // 2]
    assert f"Out of memory with {most} rows at once; going on with {most // 2}." in caplog.text


def test_no_memory_for_one_row_says_what_to_lower(model, prompts, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EngineModel, "step", never)
    with pytest.raises(
        GlmtuneError, match=r"one prompt of \d+ tokens.*data\.max_source_length.*max_new_tokens"
    ):
        answers(model, prompts)


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_out_of_memory_halves_a_batch_of_beams(model, prompts, monkeypatch, error):
    tried, real = [], beams._generate_batch

    def scarce(model, batch, *rest):
        tried.append((len(batch), max(map(len, batch))))
        if len(batch) > 3:
            raise error
        return real(model, batch, *rest)

    expected = answers(model, prompts, num_beams=2)
    monkeypatch.setattr(beams, "_generate_batch", scarce)
    assert answers(model, prompts, num_beams=2) == expected
    assert tried[:3] == [(11, 24), (5, 24), (2, 24)]
    assert max(rows for rows, _ in tried[2:]) <= 3


def test_batches_of_beams_keep_to_the_budget(model, prompts, monkeypatch):
    sizes, real = [], beams._generate_batch

    def spy(model, batch, *rest):
        sizes.append((len(batch), max(map(len, batch))))
        return real(model, batch, *rest)

    monkeypatch.setattr(beams, "_generate_batch", spy)
    answers(model, prompts, num_beams=2, max_batch_tokens=240)
    assert sizes == [(3, 24), (3, 15), (4, 9), (1, 1)]


def test_no_memory_for_one_row_of_beams_says_what_to_lower(model, prompts, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(beams, "_generate_batch", never)
    with pytest.raises(GlmtuneError, match=r"prompt of 24 tokens.*max_new_tokens` 16.*num_beams` 2"):
        answers(model, prompts, num_beams=2)


@pytest.mark.parametrize(
    ("place", "name", "num_beams"), [(EngineModel, "step", 1), (beams, "_generate_batch", 2)]
)
def test_other_errors_are_not_swallowed(model, prompts, monkeypatch, place, name, num_beams):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(place, name, broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        answers(model, prompts, num_beams=num_beams)


def test_only_beams_need_transformers(model, prompts, monkeypatch):
    def never(*_, **__):
        raise AssertionError("generated elsewhere")

    monkeypatch.setattr(type(model), "generate", never)
    for mode, settings in MODES.items():
        if mode != "beams":
            assert len(answers(model, prompts, **settings)) == len(prompts)


def test_a_model_that_an_engine_runs_is_refused(model, prompts):
    with Engine(model), pytest.raises(ConfigError, match="an engine runs this model"):
        answers(model, prompts)
    assert len(answers(model, prompts)) == len(prompts)


def test_context_overflow_is_refused(model, prompts):
    with pytest.raises(
        ConfigError, match=r"is 105, .*prompt of 24 tokens that is 129.*context is 128.*at most 104"
    ):
        answers(model, prompts, max_new_tokens=105)


def test_training_mode_is_restored_and_nothing_is_warned(model, prompts):
    model.train()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stream = generate_ids(
                model, prompts, GenerationSettings(max_new_tokens=2, batch_size=4), stop_ids=STOP, pad_id=PAD
            )
            next(stream)
            assert not model.training
            stream.close()
            assert model.training
    finally:
        model.eval()


def test_no_prompts_give_no_answers(model):
    assert answers(model, []) == {}
