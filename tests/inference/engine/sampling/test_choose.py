"""Each row of a batch is chosen by its own settings, as if it were alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from glmtune.errors import ConfigError
from glmtune.inference.engine.sampling.choose import ChosenToken, TokenChooser, prompt_logprobs
from glmtune.inference.requests.sampling import Sampling

VOCAB = 700
PROMPT = (3, 5, 5, 8)
MIXED = [
    Sampling(),
    Sampling(temperature=0.9, seed=7),
    Sampling(temperature=1.5, seed=7, top_p=0.7, logprobs=2),
    Sampling(repetition_penalty=1.3, logprobs=0),
    Sampling(temperature=4.0, seed=-3, frequency_penalty=1.5, presence_penalty=0.5, logit_bias={4: 6.0}),
    Sampling(logit_bias={9: 100.0}),
]


def step_logits(step: int, row: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1000 * row + step)) * 2


def answer(samplings: dict[int, Sampling], num_steps: int) -> dict[int, list[ChosenToken]]:
    """Choose tokens for rows of one batch; row ``i`` sees the same logits in every company."""
    chooser = TokenChooser()
    for row, sampling in samplings.items():
        chooser.add(row, sampling, PROMPT)
    chosen: dict[int, list[ChosenToken]] = {row: [] for row in samplings}
    for step in range(num_steps):
        logits = torch.stack([step_logits(step, row) for row in samplings])
        for row, token in zip(samplings, chooser.choose(logits, list(samplings)), strict=True):
            assert token is not None
            chosen[row].append(token)
    return chosen


def one(sampling: Sampling, logits_V: torch.Tensor, prompt: tuple[int, ...] = PROMPT) -> ChosenToken:
    chooser = TokenChooser()
    chooser.add("a", sampling, prompt)
    token = chooser.choose(logits_V.unsqueeze(0), ["a"])[0]
    assert token is not None
    return token


def test_row_gets_in_company_what_it_gets_alone():
    together = answer(dict(enumerate(MIXED)), 12)
    for row, sampling in enumerate(MIXED):
        alone = answer({row: sampling}, 12)[row]
        assert [each.token_id for each in alone] == [each.token_id for each in together[row]]
        assert [each.logprob is None for each in alone] == [sampling.logprobs is None] * 12


def test_row_goes_on_with_its_numbers_after_a_rest_and_after_removal():
    sampling = Sampling(temperature=3.0, seed=11, frequency_penalty=1.0, repetition_penalty=1.2)
    whole = [token.token_id for token in answer({1: sampling}, 10)[1]]
    chooser = TokenChooser()
    chooser.add(1, sampling, PROMPT)
    chooser.add("other", Sampling(temperature=1.0), PROMPT)
    for step in range(4):
        chooser.choose(torch.stack([step_logits(step, 9), step_logits(step, 1)]), [None, 1])
    chooser.choose(torch.stack([step_logits(0, 9)]), ["other"])  # a step without it
    chooser.remove(1)
    chooser.add(1, sampling, PROMPT, answer_ids=whole[:4])
    rest = [chooser.choose(step_logits(step, 1).unsqueeze(0), [1])[0] for step in range(4, 10)]
    assert [token.token_id for token in rest if token] == whole[4:]


def test_seed_decides_and_none_draws_one():
    seeded = [
        [token.token_id for token in answer({1: Sampling(temperature=5.0, seed=s)}, 8)[1]] for s in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]
    free = [[token.token_id for token in answer({1: Sampling(temperature=5.0)}, 8)[1]] for _ in range(2)]
    assert free[0] != free[1]


def test_greedy_takes_the_likeliest():
    assert one(Sampling(), step_logits(0, 0)).token_id == int(step_logits(0, 0).argmax())


def test_tiny_temperature_takes_the_likeliest():
    logits_V = torch.zeros(VOCAB)
    logits_V[5] = 0.1
    assert {one(Sampling(temperature=1e-5, seed=s), logits_V).token_id for s in range(20)} == {5}


def test_repetition_penalty_is_that_of_transformers():
    logits_V = step_logits(0, 0)
    changed = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT]), logits_V[None].clone())  # pyright: ignore
    logits_V[5] = logits_V.max() * 1.2  # the likeliest, if it were not in the prompt
    changed[0, 5] = logits_V[5] / 1.7
    assert one(Sampling(repetition_penalty=1.7), logits_V).token_id == int(changed.argmax())
    assert one(Sampling(repetition_penalty=1.7), logits_V, prompt=(3,)).token_id == 5
    negative_V = torch.full((VOCAB,), -3.0)
    negative_V[5], negative_V[7] = -1.0, -1.5
    assert one(Sampling(repetition_penalty=1.7), negative_V).token_id == 7


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        # Logits 10, 9.5, 8.8: the first token falls by what is taken off after it was chosen.
        (Sampling(presence_penalty=1.0), [0, 1, 0, 0]),
        (Sampling(frequency_penalty=1.0), [0, 1, 0, 2]),
        (Sampling(presence_penalty=-2.0), [0, 0, 0, 0]),
    ],
)
def test_penalties_look_at_the_answer_alone(sampling: Sampling, expected: list[int]):
    logits_V = torch.full((VOCAB,), -5.0)
    logits_V[:3] = torch.tensor([10.0, 9.5, 8.8])
    chooser = TokenChooser()
    chooser.add("a", sampling, (0, 0, 0))
    tokens = [chooser.choose(logits_V.unsqueeze(0), ["a"])[0] for _ in expected]
    assert [token.token_id for token in tokens if token] == expected


def test_penalties_count_more_tokens_than_there_is_room_for_at_first():
    chooser = TokenChooser()
    chooser.add("a", Sampling(presence_penalty=2.0), PROMPT)
    logits_V = torch.linspace(1.0, 0.0, VOCAB)
    tokens = [chooser.choose(logits_V.unsqueeze(0), ["a"])[0] for _ in range(VOCAB)]
    assert sorted(token.token_id for token in tokens if token) == list(range(VOCAB))


def test_bias_moves_a_token():
    logits_V = torch.zeros(VOCAB)
    logits_V[1] = 5.0
    assert one(Sampling(logit_bias={1: -100.0, 6: 0.5}), logits_V).token_id == 6
    assert one(Sampling(logit_bias={8: 100.0}, temperature=1.0, seed=0), logits_V).token_id == 8


def test_logprobs_are_those_of_the_model_before_settings():
    logits_V = step_logits(0, 0)
    sampling = Sampling(temperature=9.0, seed=5, logit_bias={2: 50.0}, top_k=3, logprobs=3)
    token = one(sampling, logits_V)
    expected = logits_V.log_softmax(-1)
    assert token.token_id == 2
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(expected[2].item(), abs=1e-5)
    top = expected.topk(3)
    assert [entry[0] for entry in token.logprob.top] == top.indices.tolist()
    assert [entry[1] for entry in token.logprob.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_rows_name_as_many_alternatives_as_each_asked_for():
    chosen = answer({0: Sampling(logprobs=0), 1: Sampling(logprobs=20), 2: Sampling(logprobs=1)}, 1)
    tops = [len(chosen[row][0].logprob.top) for row in range(3)]  # pyright: ignore[reportOptionalMemberAccess]
    assert tops == [0, 20, 1]


def test_prompt_logprobs_score_the_tokens_given():
    logits_SV = torch.stack([step_logits(step, 0) for step in range(3)])
    entries = prompt_logprobs(logits_SV, (4, 5, 6), 2)
    expected = logits_SV.log_softmax(-1)
    values = [entry.logprob for entry in entries]
    assert values == pytest.approx([expected[i, 4 + i].item() for i in range(3)], abs=1e-5)
    assert [entry.top[0][0] for entry in entries] == logits_SV.argmax(-1).tolist()
    assert prompt_logprobs(logits_SV[:0], (), 2) == []


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, logprobs=1, presence_penalty=1.0)]
)
def test_damaged_logits_are_an_error_of_their_row_alone(damage: float, sampling: Sampling):
    logits_BV = torch.stack([step_logits(0, 0), step_logits(0, 1)])
    logits_BV[0, slice(None) if damage == -math.inf else 3] = damage
    chooser = TokenChooser()
    for key in "ab":
        chooser.add(key, sampling, PROMPT)
    first, second = chooser.choose(logits_BV, ["a", "b"])
    assert first is not None
    assert "not finite" in first.error
    assert first.token_id == -1
    assert second is not None
    assert second.error == ""


def test_banned_tokens_are_no_damage():
    logits_V = torch.full((VOCAB,), -math.inf)
    logits_V[4] = -2.0
    assert one(Sampling(temperature=2.0), logits_V) == ChosenToken(4)


def test_rows_of_nobody_get_nothing_and_logits_stay():
    chooser = TokenChooser()
    chooser.add("a", Sampling(temperature=1.0, logit_bias={1: 1.0}), PROMPT)
    logits_BV = torch.stack([step_logits(0, 0), step_logits(0, 1)])
    before = logits_BV.clone()
    assert chooser.choose(logits_BV, [None, None]) == [None, None]
    assert [token is None for token in chooser.choose(logits_BV, [None, "a"])] == [True, False]
    assert torch.equal(logits_BV, before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 0.01}, "`top_k` is 0.01, but it must be a whole number"),
        ({"seed": True}, "`seed` is True"),
        ({"temperature": math.nan}, "`temperature` is nan"),
        ({"temperature": -0.1}, "`temperature` is -0.1"),
        ({"stop": "abc"}, "`stop` is 'abc', but it must be a tuple"),
        ({"logit_bias": {"1": 2.0}}, "token ids"),
        ({"logit_bias": {1: math.nan}}, "-100 to 100"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ConfigError) as caught:
        Sampling(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize("token_id", [-1, 10])
def test_bias_on_a_token_that_there_is_not(token_id: int):
    with pytest.raises(ConfigError, match=f"the token {token_id}, but the model has the tokens 0 to 9"):
        Sampling(logit_bias={token_id: 1.0}).check_vocabulary(10)
    assert Sampling(logit_bias={9: 1.0}).check_vocabulary(10) is None
