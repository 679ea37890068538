"""KL along the base's answers: zero for the base, a lower bound of the full one, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.models.load import load_official
from glmtune.prefix.attach import attach_prefix, detach_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings
from glmtune.retention.distributions import TOP, base_distributions, read_base_answers

ROWS = [([64790, 64792], [30, 31]), ([5, 6, 7], [40]), ([64, 65, 66, 67], [50, 51, 52])]
ROWS = [([number % 400 + 3 for number in prompt], answer) for prompt, answer in ROWS]


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return load_official(tiny_base, device="cpu").eval()


def full_kl(model: Any, tuned: Any, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
    """KL over the whole vocabulary, and whether the answer is greedy, one row without padding."""
    ids = torch.tensor([[*prompt, *answer]])
    places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    with torch.no_grad():
        before = model(input_ids=ids).logits[0, places].double().log_softmax(-1)
        attach_prefix(model, tuned)
        after = model(input_ids=ids).logits[0, places].double().log_softmax(-1)
        detach_prefix(model)
    greedy = after.argmax(-1).tolist() == answer
    return float((before.exp() * (before - after)).sum()), greedy


def encoder_for(model: Any) -> Any:
    torch.manual_seed(3)
    encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=4, dropout=0.0))
    with torch.no_grad():
        encoder.embedding.weight.mul_(30)
    return encoder.eval()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_base_is_no_distance_from_itself(model: Any, batch_size: int) -> None:
    base = base_distributions(model, ROWS, pad_token_id=0, batch_size=batch_size)
    assert base.token_ids.shape == (6, TOP)
    assert base.log_probs.shape == (6, TOP + 1)
    assert base.log_probs.exp().sum(dim=1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    again = read_base_answers(model, ROWS, base, which=range(3), pad_token_id=0, batch_size=batch_size)
    assert {reading.index: reading.kl_nats for reading in again} == {0: 0.0, 1: 0.0, 2: 0.0}


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lower_bound_of_the_full_divergence(model: Any, batch_size: int) -> None:
    base = base_distributions(model, ROWS, pad_token_id=0, batch_size=2)
    encoder = encoder_for(model)
    expected = [full_kl(model, encoder, *row) for row in ROWS]
    attach_prefix(model, encoder)
    found = read_base_answers(model, ROWS, base, which=[0, 1, 2], pad_token_id=0, batch_size=batch_size)
    readings = {reading.index: reading for reading in found}
    for index, (full, greedy) in enumerate(expected):
        assert full > 1e-3
        assert 0.2 * full < readings[index].kl_nats <= full + 1e-5
        assert readings[index].is_greedy == greedy


def test_nearly_the_full_one_where_all_but_a_few_tokens_are_told_apart(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmtune.retention.distributions.TOP", 10_000)  # cut to the vocabulary less one
    base = base_distributions(model, ROWS, pad_token_id=0, batch_size=3)
    encoder = encoder_for(model)
    expected = [full_kl(model, encoder, *row)[0] for row in ROWS]
    attach_prefix(model, encoder)
    found = list(read_base_answers(model, ROWS, base, which=[2, 0], pad_token_id=0, batch_size=3))
    assert {each.index: each.kl_nats for each in found} == pytest.approx(
        {0: expected[0], 2: expected[2]}, rel=1e-4
    )


def test_greedy_answers_are_told_without_generating(model: Any) -> None:
    prompt, answer = [64, 65, 66], list[int]()
    with torch.no_grad():
        for _ in range(4):
            answer.append(int(model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()))
    rows = [(prompt, answer), (prompt, [*answer[:-1], (answer[-1] + 1) % 400])]
    base = base_distributions(model, rows, pad_token_id=0, batch_size=2)
    found = read_base_answers(model, rows, base, which=[0, 1], pad_token_id=0, batch_size=2)
    assert {reading.index: reading.is_greedy for reading in found} == {0: True, 1: False}
