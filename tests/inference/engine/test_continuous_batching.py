"""Generation of the engine: stop strings, refilled slots, shared prompts of several groups, memory."""

from __future__ import annotations

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.inference.engine.batching.continuous_batching import ContinuousBatch
from glmtune.inference.engine.engine import Engine, EngineSettings
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.states.batch_states import BatchStates
from glmtune.inference.engine.stop_text import StopText
from glmtune.models.architectures import kv_cache

STOP_ID = 7


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, eos_token_id=STOP_ID,
        initializer_range=0.3,
    )  # fmt: skip
    return GlmForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts():
    source = torch.Generator().manual_seed(1)

    def words(count):
        return torch.randint(10, 48, (count,), generator=source).tolist()

    starts = [words(30), words(21), []]
    return [starts[place % 3] + words(1 + place * 5 % 13) for place in range(40)]


def decode(ids):
    return "".join(chr(ord("a") + index % 26) for index in ids)


def generate(model, prompts, *, stop=(), max_new_tokens=30, **settings):
    settings = EngineSettings(**{"min_shared_gain": 16, **settings})
    made = Engine(model, settings).generate(
        prompts, max_new_tokens=max_new_tokens, stop_ids=[STOP_ID], decode=decode, stop=stop
    )
    return {text.index: text for text in made}


@pytest.fixture(scope="module")
def alone(model, prompts):
    return {place: generate(model, [prompt], batch_size=1)[0] for place, prompt in enumerate(prompts)}


def assert_same(made, expected):
    assert sorted(made) == sorted(expected)
    for place, text in made.items():
        other = expected[place]
        assert (text.text, text.token_ids, text.stop_reason) == (
            other.text,
            other.token_ids,
            other.stop_reason,
        )


@pytest.mark.parametrize(("batch_size", "read_tokens"), [(1, 4096), (2, 20), (5, 4096), (16, 1), (64, 4096)])
def test_the_batch_changes_nothing(model, prompts, alone, batch_size, read_tokens):
    assert_same(generate(model, prompts, batch_size=batch_size, read_tokens=read_tokens), alone)


def test_completions_differ_in_length_and_reason(alone):
    assert {text.stop_reason for text in alone.values()} == {"eos", "length"}
    assert len({text.num_new_tokens for text in alone.values()}) > 4
    assert all(STOP_ID not in text.token_ids for text in alone.values())


def test_stop_strings_cut_exactly(model, prompts, alone):
    stop = ("xy", "q", "bcdefghijk")
    made = generate(model, prompts, batch_size=7, stop=stop)
    assert_same(made, {i: generate(model, [prompt], stop=stop)[0] for i, prompt in enumerate(prompts)})
    assert {text.stop_reason for text in made.values()} >= {"stop", "length"}
    for place, text in made.items():
        whole = decode(alone[place].token_ids)
        cuts = [whole.find(part) for part in stop if part in whole]
        assert text.text == (whole[: min(cuts)] if cuts else whole)
        if text.stop_reason == "stop":  # nothing is generated behind the stop string
            assert not any(part in decode(text.token_ids[:-1]) for part in stop)


def test_slots_are_refilled(model, prompts, monkeypatch):
    sizes, real = [], EngineModel.step

    def spy(self, tokens, positions, states):
        sizes.append(len(tokens))
        return real(self, tokens, positions, states)

    monkeypatch.setattr(EngineModel, "step", spy)
    made = generate(model, prompts, batch_size=8)
    assert max(sizes) == 8
    useful = sum(text.num_new_tokens for text in made.values())
    assert useful > 0.75 * sum(sizes)  # of the rows stepped, few were empty slots
    assert sizes[-1] < 8  # the last rows do not drag empty slots along


def test_finished_completions_come_before_the_end(model, prompts):
    made = Engine(model, EngineSettings(batch_size=4)).generate(
        prompts, max_new_tokens=20, stop_ids=[STOP_ID], decode=decode
    )
    first = next(made)
    assert first.index in range(len(prompts))
    made.close()


class Scarce:
    """Lets forward passes over too many tokens fail as CUDA does."""

    def __init__(self, monkeypatch, most_rows, error):
        self.sizes, real = [], EngineModel._forward

        def forward(model, states, **inputs):
            rows, length = inputs["input_ids"].shape
            self.sizes.append((rows, length))
            if rows > most_rows:
                raise error
            return real(model, states, **inputs)

        monkeypatch.setattr(EngineModel, "_forward", forward)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("can't allocate memory: 5"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_out_of_memory_halves_and_goes_on(model, prompts, alone, monkeypatch, caplog, error):
    scarce = Scarce(monkeypatch, 3, error)
    assert_same(generate(model, prompts, batch_size=16), alone)
    assert max(rows for rows, _ in scarce.sizes) > 3
    assert sum(rows > 3 for rows, _ in scarce.sizes) < 20  # it learns
    assert "Out of memory" in caplog.text


@pytest.mark.parametrize("failing_steps", [{3}, {5, 6}, {2, 9, 10, 30}])
def test_rows_sent_back_keep_what_they_have(model, prompts, alone, monkeypatch, failing_steps):
    count, real, generated = [0], EngineModel.step, []

    def step(self, tokens, positions, states):
        count[0] += 1
        if count[0] in failing_steps:
            raise torch.OutOfMemoryError("CUDA out of memory")
        generated.append(len(tokens))
        return real(self, tokens, positions, states)

    monkeypatch.setattr(EngineModel, "step", step)
    assert_same(generate(model, prompts, batch_size=16), alone)
    useful = sum(text.num_new_tokens for text in alone.values())
    assert sum(generated) < 1.3 * useful  # no token is generated twice


def test_the_requests_that_got_least_far_go_back(model, prompts, alone, monkeypatch):
    """What goes back is read again, prompt and generated tokens: the furthest would cost most."""
    real, retreat = EngineModel.step, ContinuousBatch._retreat_from_step
    count, seen = [0], []

    def step(self, tokens, positions, states):
        count[0] += 1
        if count[0] in (36, 60):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, positions, states)

    def spy(batch, rows):
        before = {row: len(row.generated) for row in batch._running_rows}
        retreat(batch, rows)
        kept = [before.pop(row) for row in batch._running_rows]
        seen.append((sorted(kept), sorted(before.values())))

    monkeypatch.setattr(EngineModel, "step", step)
    monkeypatch.setattr(ContinuousBatch, "_retreat_from_step", spy)
    assert_same(generate(model, prompts, batch_size=8), alone)
    assert len(seen) == 2
    for kept, gone in seen:
        assert len(kept) == (len(kept) + len(gone)) // 2
        assert min(kept) >= max(gone)
        assert max(kept) > min(gone)  # there was a choice


@pytest.mark.parametrize("failing", [{1}, {7}, {4, 12}, {20}])
def test_slots_that_cannot_grow_stay_as_they_were(model, prompts, alone, monkeypatch, failing):
    count, real = [0], kv_cache._larger

    def grown(*arguments):
        count[0] += 1
        if count[0] in failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(kv_cache, "_larger", grown)
    assert_same(generate(model, prompts, batch_size=16, read_tokens=400), alone)
    assert count[0] > max(failing)


@pytest.mark.parametrize("failing", [{1}, {1, 2}, {3}])
def test_slots_that_cannot_be_packed_stay_as_they_were(model, prompts, alone, monkeypatch, failing):
    count, real = [0], BatchStates.tighten

    def tighten(self, *, keep_room):
        count[0] += 1
        if count[0] in failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, keep_room=keep_room)

    monkeypatch.setattr(BatchStates, "tighten", tighten)
    assert_same(generate(model, prompts, batch_size=16), alone)
    assert count[0] >= max(failing)


def test_scores_halve_on_out_of_memory(model, prompts, monkeypatch):
    expected = dict(Engine(model).score_next(prompts, [[5, 6]] * len(prompts)))
    scarce = Scarce(monkeypatch, 2, ERRORS[0])
    scores = dict(Engine(model).score_next(prompts, [[5, 6]] * len(prompts)))
    assert max(rows for rows, _ in scarce.sizes) > 2
    for place, values in expected.items():
        assert scores[place] == pytest.approx(values, abs=1e-5)


def test_no_memory_for_one_prompt_says_what_to_do(model, prompts, monkeypatch):
    Scarce(monkeypatch, 0, ERRORS[0])
    with pytest.raises(GlmtuneError, match=r"one prompt of \d+ tokens.*model\.dtype=bfloat16"):
        generate(model, prompts)
    with pytest.raises(GlmtuneError, match=r"one prompt of \d+ tokens"):
        list(Engine(model).score_next(prompts, [[5]] * len(prompts)))


def test_no_memory_for_one_step_says_so(model, prompts, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EngineModel, "step", never)
    with pytest.raises(GlmtuneError, match="one prompt of"):
        generate(model, prompts)


def test_other_errors_are_not_swallowed(model, prompts, monkeypatch):
    Scarce(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate(model, prompts)


def test_prompts_beyond_the_context_are_refused(model):
    with pytest.raises(ConfigError, match=r"longest prompt has 250 tokens.*`max_new_tokens` 7.*257.*256"):
        generate(model, [[9] * 250], max_new_tokens=7)
    with pytest.raises(ConfigError, match=r"longest prompt has 257 tokens"):
        list(Engine(model).score_next([[9] * 257], [[1]]))


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"`engine\.read_tokens` is 0, but it must be at least 1"):
        EngineSettings(read_tokens=0)


def test_a_stop_string_across_many_tokens_is_found():
    stop = StopText(lambda ids: "".join(map(chr, ids)), ("END.",))
    ids = [ord(letter) for letter in "the END"]
    assert not stop.is_complete(ids)
    assert stop.is_complete([*ids, ord(".")])
    assert stop.text([*ids, ord("."), ord("x")]) == "the "


def test_the_earliest_stop_string_wins():
    stop = StopText(lambda ids: "".join(map(chr, ids)), ("b", "ab"))
    assert stop.text([ord(letter) for letter in "xxaby"]) == "xx"
