"""Fitting a rule: what it learns, what it says of itself, and that it is the same every time."""

from __future__ import annotations

import pytest
import torch

from glmtune.switch.fit import MIN_PROMPTS, PENALTY, area_under_curve, fit_logistic, fit_one_class


def clouds(distance, *, num=120, width=32, seed=0):
    source = torch.Generator().manual_seed(seed)
    task = torch.randn(num, width, generator=source)
    general = torch.randn(num + 30, width, generator=source) * 1.5
    task[:, 3] += distance
    return 5 * task + 2, 5 * general + 2  # neither centred nor scaled


def test_what_is_apart_is_told_apart():
    task, general = clouds(16.0)
    switch = fit_logistic(task, general)
    facts = switch.facts
    assert (facts.kind, facts.auroc, facts.task_off, facts.general_on) == ("logistic", 1.0, 0.0, 0.0)
    assert (facts.num_task, facts.num_general) == (40, 50)
    assert switch.decide(task).all()
    assert not switch.decide(general).any()
    assert facts.line().startswith("AUROC 1.000, task prompts off 0.0 %, general prompts on 0.0 %")


def test_what_is_the_same_is_not():
    facts = fit_logistic(*clouds(0.0)).facts
    assert facts.auroc is not None
    assert facts.auroc < 0.8


def test_it_is_the_minimum_of_the_penalised_loss():
    """The gradient of the formula, written out anew, vanishes at the fitted weights."""
    task, general = (part.double() for part in clouds(2.0))
    switch = fit_logistic(task, general)
    held = lambda part: part[torch.arange(len(part)) % 3 != 2]  # noqa: E731
    task, general = held(task), held(general)
    both = torch.cat([task, general])
    scale, mean = both.std(dim=0), both.mean(dim=0)
    weight = (switch.weight.double() * scale).requires_grad_()
    bias = torch.tensor(switch.bias + float(switch.weight.double() @ mean)).double().requires_grad_()
    losses = [
        torch.log1p(torch.exp(-sign * ((part - mean) / scale @ weight + bias))).mean() / 2
        for sign, part in ((1, task), (-1, general))
    ]
    (losses[0] + losses[1] + PENALTY / 2 * (weight**2).sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.abs().max() < 1e-5
    assert bias.grad.abs() < 1e-5


def test_the_same_prompts_give_the_same_bits():
    first, second = (fit_logistic(*clouds(3.0)) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert (first.bias, first.facts, first.fingerprint) == (second.bias, second.facts, second.fingerprint)
    other = fit_logistic(*clouds(3.0, seed=1))
    assert other.fingerprint != first.fingerprint


def test_one_class_knows_the_task_alone():
    task, general = clouds(60.0, num=300)
    switch = fit_one_class(task, general - 2)
    assert switch.facts.kind == "one_class"
    assert switch.facts.task_off < 0.06
    assert switch.facts.general_on == 0
    alone = fit_one_class(task)
    assert alone.fingerprint == switch.fingerprint
    assert (alone.facts.auroc, alone.facts.general_on, alone.facts.num_general) == (None, None, 0)
    assert "fitted without general prompts" in alone.facts.line()


def test_more_features_than_prompts():
    task, general = clouds(8.0, num=MIN_PROMPTS, width=400)
    switch = fit_logistic(task, general)
    assert switch.weight.isfinite().all()
    assert fit_one_class(task).weight.isfinite().all()


@pytest.mark.parametrize(
    ("above", "below", "area"),
    [([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([1, 1], [1, 1], 0.5), ([2], [1, 2, 3], 0.5)],
)
def test_area_under_curve(above, below, area):
    assert area_under_curve(torch.tensor(above).float(), torch.tensor(below).float()) == area


def test_not_finite_is_the_base():
    switch = fit_logistic(*clouds(8.0))
    assert not switch.decide(torch.full((1, 32), float("nan")))[0]
