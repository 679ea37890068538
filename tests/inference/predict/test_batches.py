"""Generation in token ids on a tiny random model."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.inference.predict import batches
from glmtune.inference.predict.batches import generate_ids
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


def test_padding_token_that_may_be_emitted_is_not_penalized(model, prompts):
    settings = GenerationSettings(repetition_penalty=1.5, max_new_tokens=8)
    together = {a.index: a for a in generate_ids(model, prompts, settings, stop_ids=STOP, pad_id=7)}
    single = GenerationSettings(repetition_penalty=1.5, max_new_tokens=8, batch_size=1)
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


def test_longest_prompts_come_first_and_batches_keep_to_the_budget(model, prompts, monkeypatch):
    sizes, real = [], batches._generate_batch

    def spy(model, batch, *rest):
        sizes.append((len(batch), max(map(len, batch))))
        return real(model, batch, *rest)

    monkeypatch.setattr(batches, "_generate_batch", spy)
    answers(model, prompts, max_batch_tokens=120)
    assert sizes == [(3, 24), (3, 15), (4, 9), (1, 1)]
    sizes.clear()
    answers(model, prompts, max_batch_tokens=1, batch_size=4)
    assert [rows for rows, _ in sizes] == [1] * len(prompts)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 5 bytes")]
)
def test_out_of_memory_halves_the_batch_and_goes_on(model, prompts, monkeypatch, error):
    tried, real = [], batches._generate_batch

    def scarce(model, batch, *rest):
        tried.append(len(batch))
        if len(batch) > 3:
            raise error
        return real(model, batch, *rest)

    expected = answers(model, prompts)
    monkeypatch.setattr(batches, "_generate_batch", scarce)
    assert answers(model, prompts) == expected
    assert tried[:3] == [11, 5, 2]
    assert max(tried[2:]) <= 3


def test_no_memory_for_one_row_says_what_to_lower(model, prompts, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batches, "_generate_batch", never)
    with pytest.raises(GlmtuneError, match=r"prompt of 24 tokens.*max_new_tokens` 16.*num_beams` 1"):
        answers(model, prompts)


def test_other_errors_are_not_swallowed(model, prompts, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(batches, "_generate_batch", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        answers(model, prompts)


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
