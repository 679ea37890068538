"""Fitting a rule to the hidden states of prompts: logistic regression, or one class where there is one.

Both are deterministic, in float64 on the CPU: the same prompts give the same bits. Every third prompt is held
out and only measured; neither the weights nor the threshold see it.

Shapes: N prompts, D width of hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmtune.switch.rule import Switch, SwitchFacts

HELD_OUT_EVERY = 3
"""One prompt of so many is held out."""
MIN_PROMPTS = 24
"""Of each kind: with fewer than eight held out, no figure of them means anything."""
PENALTY = 1e-3
"""Half of it times the squared weights is added to the mean loss: features are standardised, and there may be
ten times as many as prompts, which are then told apart without it by weights that grow for ever."""
RIDGE = 0.1
"""One class: this share of the mean variance is added to every variance (as in the measurements for
``docs/retention.md``), as fewer prompts than features have directions without any."""
OFF_QUANTILE = 0.01
"""One class: the share of task prompts that may score below the threshold."""


def fit_logistic(task_ND: Tensor, general_ND: Tensor) -> Switch:
    """Tell task prompts from general ones.

    Minimises the mean logistic loss, each kind counted half whatever its number, plus the penalty, by L-BFGS
    over standardised features; the threshold is at even odds.

    Args:
        task_ND: hidden states of task prompts, at least `MIN_PROMPTS`, any float type.
        general_ND: those of general prompts.

    Returns:
        The rule, over hidden states as they are, and its figures on the prompts held out.
    """
    task, task_held = _split(task_ND)
    general, general_held = _split(general_ND)
    both = torch.cat([task, general])
    mean_D, scale_D = both.mean(dim=0), both.std(dim=0).clamp_min(1e-6)
    signs_N = torch.cat([torch.ones(len(task)), -torch.ones(len(general))]).double()
    shares_N = torch.cat([torch.full((len(part),), 0.5 / len(part)) for part in (task, general)]).double()
    weight_D, bias = _minimise((both - mean_D) / scale_D, signs_N, shares_N)
    weight_D = weight_D / scale_D
    bias -= float(weight_D @ mean_D)
    return _measured("logistic", weight_D, bias, task_held, general_held)


def fit_one_class(task_ND: Tensor, general_ND: Tensor | None = None) -> Switch:
    """Tell task prompts from everything else, having seen nothing else.

    The direction is that in which task prompts stand out most from zero for their spread, Σ⁻¹ μ with Σ +
    ridge; the threshold is the first percentile of the scores of prompts that the direction was not made of.

    Args:
        task_ND: hidden states of task prompts, at least `MIN_PROMPTS`.
        general_ND: only measured, where given.

    Returns:
        The rule.
    """
    known, held_D = _split(task_ND)
    first, second = known[::2], known[1::2]
    mean_D = first.mean(dim=0)
    centred = first - mean_D
    covariance = centred.T @ centred / len(first)
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
    covariance += ridge * torch.eye(len(mean_D), dtype=torch.float64)
    weight_D = torch.linalg.solve(covariance, mean_D)
    threshold = float(torch.quantile(second @ weight_D, OFF_QUANTILE))
    general = None if general_ND is None else general_ND.double().cpu()
    return _measured("one_class", weight_D, -threshold, held_D, general)


def area_under_curve(above_N: Tensor, below_N: Tensor) -> float:
    """Return the share of pairs whose first score is the higher one, ties counted half.

    Args:
        above_N: scores that should be high.
        below_N: scores that should be low.

    >>> area_under_curve(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    ordered_N = below_N.sort().values
    lower = torch.searchsorted(ordered_N, above_N.contiguous())
    not_higher = torch.searchsorted(ordered_N, above_N.contiguous(), right=True)
    return float((lower + not_higher).double().mean() / (2 * len(below_N)))


def _split(hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Divide prompts into those to fit and those held out, spread over all of them; float64."""
    hidden_ND = hidden_ND.double().cpu()
    is_held = torch.arange(len(hidden_ND)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return hidden_ND[~is_held], hidden_ND[is_held]


def _minimise(features_ND: Tensor, signs_N: Tensor, shares_N: Tensor) -> tuple[Tensor, float]:
    """Return the weights ``[D]`` and the bias of the least penalised loss."""
    weight_D = torch.zeros(features_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight_D, bias],
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        margins_N = signs_N * (features_ND @ weight_D + bias)
        value = (
            shares_N * torch.nn.functional.softplus(-margins_N)
        ).sum() + PENALTY / 2 * weight_D.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(lambda: loss())  # pyright: ignore[reportArgumentType]
    return weight_D.detach(), float(bias.detach())


def _measured(kind: str, weight_D: Tensor, bias: float, task_ND: Tensor, general_ND: Tensor | None) -> Switch:
    """Return the rule as it is saved, measured as it will decide."""
    switch = Switch(weight_D.float(), float(torch.tensor(bias, dtype=torch.float32)), _UNKNOWN)
    task_N = switch.scores(task_ND)
    general_N = None if general_ND is None else switch.scores(general_ND)
    facts = SwitchFacts(
        kind=kind,
        auroc=None if general_N is None else area_under_curve(task_N, general_N),
        task_off=float((task_N <= 0).double().mean()),
        general_on=None if general_N is None else float((general_N > 0).double().mean()),
        num_task=len(task_N),
        num_general=0 if general_N is None else len(general_N),
    )
    return Switch(switch.weight, switch.bias, facts)


_UNKNOWN = SwitchFacts("", None, 0.0, None, 0, 0)
