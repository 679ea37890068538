"""What an evaluation says of compared answers: loss, rewards and margins, each over all rows at once.

Shapes: N examples, in the order of the data. Columns of what is measured of an example:

    0, 1   log-probability of its first and second row under the model
    2, 3   the same under the reference; of a loss without one 0
    4, 5   tokens of the two answers
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmtune.metrics.summary import NUM_RESAMPLES, percentile_interval, resamples
from glmtune.preference.losses import dpo_losses, ipo_losses, kto_losses, orpo_losses
from glmtune.preference.rows import PreferenceRows
from glmtune.preference.settings import PreferenceSettings

NUM_COLUMNS = 6
Array = NDArray[np.float64]


def example_losses(
    settings: PreferenceSettings,
    ratios: tuple[Tensor, Tensor],
    means: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor],
    *,
    desirable_B: Tensor,
    kl: Tensor | None = None,
) -> Tensor:
    """Return the loss of every example, without the usual loss beside it, ``[B]``.

    Args:
        settings: which loss.
        ratios: log-ratios to the reference, of first and second rows; each ``[B]``.
        means: mean log-probabilities per token.
        tokens: how many each answer has.
        desirable_B: the judgements (kto).
        kl: z_0 (kto).
    """
    beta = settings.beta
    if settings.loss == "dpo":
        return dpo_losses(*ratios, beta=beta, label_smoothing=settings.label_smoothing)
    if settings.loss == "ipo":
        return ipo_losses(*ratios, *tokens, beta=beta)
    if settings.loss == "orpo":
        return orpo_losses(*means, beta=beta)
    assert kl is not None
    return kto_losses(
        ratios[0],
        desirable_B,
        kl,
        beta=beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
    )


def row_rewards(settings: PreferenceSettings, ratios: Tensor, means: Tensor) -> Tensor:
    """Return the rewards that a policy implies: of ORPO, which has no reference, weighted likelihoods."""
    return settings.beta * (ratios if settings.has_reference else means)


def preference_figures(
    values_NC: Tensor, rows: PreferenceRows, settings: PreferenceSettings, *, seed: int = 0
) -> dict[str, float]:
    """Sum up an evaluation.

    KTO's z_0 is that of all rows here, not of a batch, so that no figure depends on the batch size.

    Args:
        values_NC: float64 ``[N, 6]``, see the module.
        rows: the examples.
        settings: of the loss.
        seed: of the bootstrap.

    Returns:
        ``loss``; ``accuracy``, the share of pairs whose better answer has the higher reward (ties count
        half), of judged answers the share whose reward has the sign of the judgement; ``rewards/chosen``,
        ``rewards/rejected``, ``rewards/margins`` and ``rewards/accuracies``, the last two with ``_low`` and
        ``_high``, the ends of the 95 % percentile bootstrap interval over pairs (or judged answers);
        ``logps/chosen`` and ``logps/rejected`` (nats per answer); ``nll`` (nats per token of the better
        answers); ``tokens``; of KTO ``kl``.
    """
    desirable = torch.from_numpy(np.ascontiguousarray(rows.desirable))
    policy, reference, tokens = values_NC[:, 0:2], values_NC[:, 2:4], values_NC[:, 4:6]
    ratios, means = policy - reference, policy / tokens.clamp(min=1)
    kl = ratios[:, 1].mean().clamp(min=0)
    losses = example_losses(
        settings,
        (ratios[:, 0], ratios[:, 1]),
        (means[:, 0], means[:, 1]),
        (tokens[:, 0], tokens[:, 1]),
        desirable_B=desirable,
        kl=kl,
    )
    rewards = row_rewards(settings, ratios, means)
    nll = float(-policy[desirable, 0].sum() / tokens[desirable, 0].sum().clamp(min=1))
    counted = tokens if settings.takes_pairs else tokens[:, :1]  # a mismatched answer is none of the data's
    figures = {
        "loss": float(losses.mean()) + settings.nll_weight * nll,
        **_compared(rewards.numpy(), policy.numpy(), rows, settings, seed),
        "nll": nll,
        "tokens": int(counted.sum()),
    }
    return figures if settings.takes_pairs else figures | {"kl": float(kl)}


def _compared(
    rewards: Array, policy: Array, rows: PreferenceRows, settings: PreferenceSettings, seed: int
) -> dict[str, float]:
    if settings.takes_pairs:
        return _of_pairs(rewards[:, 0], rewards[:, 1], policy[:, 0], policy[:, 1], seed)
    if rows.are_paired:  # judged one by one, and still known to belong together
        reward, log_prob = rewards[:, 0], policy[:, 0]
        return _of_pairs(reward[::2], reward[1::2], log_prob[::2], log_prob[1::2], seed)
    return _of_judged(rewards[:, 0], policy[:, 0], rows.desirable, seed)


def _of_pairs(
    better: Array, worse: Array, log_better: Array, log_worse: Array, seed: int
) -> dict[str, float]:
    margins = better - worse
    right = (np.sign(margins) + 1) / 2  # 1, or a half for a tie, or 0
    means = np.stack([margins, right], axis=1)
    draws = [weights @ means / len(means) for weights in _draws(len(means), seed)]
    return _named(
        (better.mean(), worse.mean(), margins.mean(), right.mean()),
        percentile_interval(np.concatenate(draws)),
        (log_better.mean(), log_worse.mean()),
    )


def _of_judged(rewards: Array, log_probs: Array, desirable: NDArray[np.bool_], seed: int) -> dict[str, float]:
    """Return the figures of answers that stand alone; without any of one kind its figures are 0."""
    good = desirable.astype(np.float64)
    right = (np.sign(rewards) * np.where(desirable, 1, -1) + 1) / 2
    columns = np.stack([rewards * good, good, rewards * (1 - good), 1 - good, right], axis=1)

    def both(sums: Array) -> Array:
        chosen, rejected = (sums[:, at] / np.maximum(sums[:, at + 1], 1) for at in (0, 2))
        return np.stack([chosen - rejected, sums[:, 4] / len(rewards)], axis=1)

    [(margin, accuracy)] = both(columns.sum(axis=0, keepdims=True))
    draws = np.concatenate([both(weights @ columns) for weights in _draws(len(rewards), seed)])
    chosen, rejected, log_chosen, log_rejected = (
        float(values[side].mean()) if side.any() else 0.0
        for values in (rewards, log_probs)
        for side in (desirable, ~desirable)
    )
    return _named(
        (chosen, rejected, margin, accuracy), percentile_interval(draws), (log_chosen, log_rejected)
    )


def _draws(count: int, seed: int) -> list[Array]:
    return list(resamples(count, num_resamples=NUM_RESAMPLES, seed=seed))


def _named(
    rewards: tuple[float, float, float, float], ends: tuple[Array, Array], log_probs: tuple[float, float]
) -> dict[str, float]:
    chosen, rejected, margin, accuracy = map(float, rewards)
    (low, high), names = ends, ("rewards/margins", "rewards/accuracies")
    return {
        "accuracy": accuracy,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        **{
            f"{name}{end}": float(value)
            for place, (name, middle) in enumerate(zip(names, (margin, accuracy), strict=True))
            for end, value in (("", middle), ("_low", low[place]), ("_high", high[place]))
        },
        "logps/chosen": float(log_probs[0]),
        "logps/rejected": float(log_probs[1]),
    }
