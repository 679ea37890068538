"""The engine gives what the plain path gives: every generation, with prefix and LoRA, shared or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmtune.inference.engine import model as engine_model
from glmtune.inference.engine.engine import Engine, EngineSettings
from glmtune.inference.engine.reading import Before
from glmtune.inference.engine.states.batch_states import BatchStates
from glmtune.inference.engine.states.rows import NewRow
from glmtune.loading import load_model
from glmtune.models.load import load_official
from glmtune.prefix.attach import attach_prefix, prefix_of
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from tests.inference.engine.cases import (
    FAMILIES,
    GOLDEN,
    ORACLES,
    WORDS,
    plain_generate,
    plain_logits,
    shared_prompts,
)

SMALL = EngineSettings(batch_size=4, min_shared_gain=6, read_tokens=40)
STOP = (7, 11, 23)


def load(name: str, attention: str | None = None):
    model = load_official(
        GOLDEN / name, dtype="float32", device="cpu", family=FAMILIES[name], attn_implementation=attention
    )
    torch.manual_seed(4)  # a head of its own: under a tied one a random model repeats its last token
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    return model


def attach(model, *, projection: bool):
    torch.manual_seed(1)
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=5, hidden_size=16 if projection else None)
    attach_prefix(model, encoder)


def add_lora(model):
    from peft import LoraConfig, get_peft_model

    names = ["query_key_value"] if FAMILIES["chatglm"] == model.family else ["q_proj", "v_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, lora_alpha=8))
    torch.manual_seed(2)
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.normal_(std=0.3)
    return adapted


def check(model, prompts, settings=SMALL):
    engine = Engine(model, settings)
    vocab = list(range(40))
    scores = dict(engine.score_next(prompts, [vocab] * len(prompts)))
    assert sorted(scores) == list(range(len(prompts)))
    for place, prompt in enumerate(prompts):
        expected = plain_logits(model, prompt).log_softmax(-1)[:40]
        torch.testing.assert_close(torch.tensor(scores[place]), expected, atol=1e-5, rtol=0)
        assert int(torch.tensor(scores[place]).argmax()) == int(expected.argmax())
    made = {
        text.index: text
        for text in engine.generate(prompts, max_new_tokens=12, stop_ids=STOP, decode=lambda ids: str(ids))
    }
    assert sorted(made) == list(range(len(prompts)))
    for place, prompt in enumerate(prompts):
        expected_ids = plain_generate(model, prompt, STOP, 12)
        ended = expected_ids[-1] in STOP
        assert list(made[place].token_ids) == expected_ids[: len(expected_ids) - ended]
        assert made[place].stop_reason == ("eos" if ended else "length")
        assert made[place].num_new_tokens == len(expected_ids)
        assert made[place].num_prompt_tokens == len(prompt)
    return made


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_generation(name):
    model = load(name)
    made = check(model, shared_prompts(model.config))
    if name not in ("chatglm-1d", "chatglm-march"):  # these two repeat one token whatever they read
        assert len({text.token_ids for text in made.values()}) > 3


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("with_prefix", [False, True])
def test_logits_of_every_step_are_those_of_the_whole_text(name, with_prefix):
    """Tokens alone would not tell: a model may choose the same ones at wrong positions."""
    model = load(name)
    if with_prefix:
        attach(model, projection=False)
    engine, states = engine_model.EngineModel(model), BatchStates()
    rows = [list(prompt) for prompt in shared_prompts(model.config)[:4]]
    reading = engine.read(rows, [Before()], keep=True)
    states.add(
        [
            NewRow(reading.layers_of(place), len(row), len(row) + 9, None, None)
            for place, row in enumerate(rows)
        ]
    )
    logits = engine.logits(reading.last_hidden_BD)
    positions, steps = reading.positions.unbind(1)
    for number in range(5):
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found, plain_logits(model, row), atol=1e-4, rtol=1e-5)
        tokens = [WORDS[(7 * number + 3 * place) % len(WORDS)] for place in range(len(rows))]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        order = states.order  # of the rows, in which the states compute them
        hidden = engine.step([[tokens[row_id]] for row_id in order], positions[order][..., None], states)
        states.advance()
        logits = engine.logits(hidden[:, 0])[[order.index(place) for place in range(len(rows))]]
        positions = positions + steps


@pytest.mark.parametrize("folder", ORACLES)
def test_oracle_checkpoints(oracles: Path, folder):
    model = load_official(oracles / folder, dtype="float32", device="cpu")
    check(model, shared_prompts(model.config))


@pytest.mark.parametrize("folder", ["v2/int4", "v2/int8", "v1/int8", "v1/int4_embeddings"])
def test_quantized_checkpoints(oracles: Path, folder):
    model = load_model(oracles / folder, dtype="float32", device="cpu")
    check(model, shared_prompts(model.config))


@pytest.mark.parametrize("name", ["chatglm2", "chatglm", "chatglm-1d", "glm4"])
@pytest.mark.parametrize("projection", [False, True])
def test_with_a_prefix(name, projection):
    model = load(name)
    without = plain_logits(model, shared_prompts(model.config)[0])
    attach(model, projection=projection)
    assert (plain_logits(model, shared_prompts(model.config)[0]) - without).abs().max() > 0.01
    check(model, shared_prompts(model.config))
    assert prefix_of(model) is not None


@pytest.mark.parametrize("name", ["chatglm2", "chatglm"])
def test_with_lora(name):
    model = load(name)
    without = plain_logits(model, shared_prompts(model.config)[0])
    adapted = add_lora(model)
    assert (plain_logits(adapted, shared_prompts(model.config)[0]) - without).abs().max() > 0.01
    check(adapted, shared_prompts(model.config))


@pytest.mark.parametrize("name", ["chatglm3", "chatglm"])
def test_eager_models_keep_their_attention(name):
    model = load(name, "eager")
    check(model, shared_prompts(model.config))
    assert model.config._attn_implementation == "eager"


class Int8Linear(torch.nn.Module):
    """A linear layer whose weight is codes and scales."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("name", ["chatglm3", "chatglm"])
def test_quantized_layers_are_called_not_read(name):
    model = load(name)
    before = plain_logits(model, shared_prompts(model.config)[0])
    for layer in model.base_model.layers:
        for parent in layer.modules():
            for key, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, key, Int8Linear(child))
    assert (plain_logits(model, shared_prompts(model.config)[0]) - before).abs().max() > 1e-4
    check(model, shared_prompts(model.config))


def test_a_shared_prompt_is_read_once(passes):
    model = load("chatglm2")
    prompts = [[*range(5, 35), 5 + place] for place in range(8)]
    list(Engine(model, SMALL).score_next(prompts, [[5, 6]] * 8))
    assert passes == [(1, 30), (4, 1), (4, 1)]


def test_a_nested_shared_prompt_continues_the_one_before(passes):
    model = load("chatglm2")
    first = list(range(5, 25))
    prompts = [[*first, 30, place] for place in range(5, 9)] + [
        [*first, *range(31, 39), place] for place in range(5, 9)
    ]
    list(Engine(model, SMALL).score_next(prompts, [[5, 6]] * 8))
    assert [size for size in passes if size[0] == 1] == [(1, 20), (1, 8)]


def test_chatglm_6b_never_shares(passes):
    model = load("chatglm")
    prompts = [[*range(5, 35), 5 + place, 41, 44] for place in range(8)]
    list(Engine(model, SMALL).score_next(prompts, [[5, 6]] * 8))
    assert all(rows * length == rows * 33 for rows, length in passes)


def test_sharing_can_be_switched_off(passes):
    model = load("chatglm2")
    prompts = shared_prompts(model.config)
    settings = EngineSettings(batch_size=4, share_prefixes=False)
    alone = dict(Engine(model, settings).score_next(prompts, [[5, 6]] * len(prompts)))
    read = sum(rows * length for rows, length in passes)
    shared = dict(Engine(model, SMALL).score_next(prompts, [[5, 6]] * len(prompts)))
    assert sum(rows * length for rows, length in passes) - read < 0.7 * read
    for place, scores in alone.items():
        assert scores == pytest.approx(shared[place], abs=1e-5)


def test_nested_use_of_one_engine():
    model = load("chatglm2")
    attach(model, projection=False)
    engine, prompts = Engine(model, SMALL), shared_prompts(model.config)
    expected = dict(engine.score_next(prompts, [[5, 6]] * len(prompts)))
    for text in engine.generate(prompts, max_new_tokens=4, stop_ids=STOP, decode=str):
        [(_, scores)] = engine.score_next([prompts[text.index]], [[5, 6]])
        assert scores == pytest.approx(expected[text.index], abs=1e-5)


def test_nothing_asked_nothing_answered():
    engine = Engine(load("chatglm2"))
    assert list(engine.score_next([], [])) == []
    assert list(engine.generate([], max_new_tokens=4, stop_ids=STOP, decode=str)) == []
