"""The losses of preference tuning, per example, over log-probabilities of whole answers.

    r_w = log p(y_w|x) - log p_ref(y_w|x)        the better answer y_w; r_l likewise of the worse one
    r_w - r_l                                    what DPO and IPO push apart
    beta * r                                     the reward that a policy implies (DPO's paper, section 4)

Shapes: B examples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LOG_HALF = -math.log(2.0)


def dpo_losses(better_B: Tensor, worse_B: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of direct preference optimization, ``[B]``.

    Args:
        better_B: log-ratio of the better answer to the reference, summed over its tokens.
        worse_B: of the worse answer.
        beta: strength of the reference.
        label_smoothing: share of pairs that are reckoned to be the wrong way round.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with smoothing as in its authors' note on noisy labels
        (conservative DPO), a mixture of the loss and that of the pair turned around.

    >>> dpo_losses(torch.zeros(1), torch.zeros(1), beta=0.1).item()  # log 2: neither is preferred
    0.6931471824645996
    """
    margin_B = beta * (better_B - worse_B)
    return -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)


def ipo_losses(
    better_B: Tensor, worse_B: Tensor, better_tokens_B: Tensor, worse_tokens_B: Tensor, *, beta: float
) -> Tensor:
    """Return the loss of identity preference optimization, ``[B]``.

    The margin is to be 1 / (2 beta) and no more. Log-ratios are means over the tokens of an answer: their
    sums grow with its length, and the margin that is asked for does not. The authors say of the paper's
    results that theirs were means as well.

    Args:
        better_B: log-ratio of the better answer to the reference, summed over its tokens.
        worse_B: of the worse answer.
        better_tokens_B: tokens of the better answer.
        worse_tokens_B: of the worse answer.
        beta: tau of the paper.

    Source:
        Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    margin_B = better_B / better_tokens_B.clamp(min=1) - worse_B / worse_tokens_B.clamp(min=1)
    return (margin_B - 1 / (2 * beta)) ** 2


def orpo_losses(better_B: Tensor, worse_B: Tensor, *, beta: float) -> Tensor:
    """Return the odds ratio's part of the loss of ORPO, ``[B]``; the likelihood's part is the usual loss.

    Args:
        better_B: mean log-probability per token of the better answer, below 0; there is no reference.
        worse_B: of the worse answer.
        beta: weight of this part (lambda of the paper).

    Source:
        Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7; odds(y) = p / (1 - p).
    """
    log_odds_B = better_B - worse_B - (_log1mexp(better_B) - _log1mexp(worse_B))
    return -beta * logsigmoid(log_odds_B)


def kto_losses(
    ratio_B: Tensor,
    desirable_B: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the loss of Kahneman-Tversky optimization, ``[B]``.

    Args:
        ratio_B: log-ratio of the answer to the reference, summed over its tokens.
        desirable_B: bool, the judgement.
        kl: z_0, how far the policy is from the reference, not below 0; ``[]``, without gradient.
        beta: strength of the reference.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Source:
        Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8: lambda_y - v, v = lambda_y sigmoid(beta gain).
    """
    gain_B = torch.where(desirable_B, ratio_B - kl, kl - ratio_B)
    weight_B = torch.where(desirable_B, desirable_weight, undesirable_weight)
    return weight_B * (1 - torch.sigmoid(beta * gain_B))


def _log1mexp(values: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of x below 0 without losing digits at either end.

    An answer of probability 1 has infinite odds; the nearest number below 0 stands for it.
    """
    below = values.clamp(max=-torch.finfo(values.dtype).eps)
    return torch.where(
        below > _LOG_HALF, torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(below.clamp(max=_LOG_HALF)))
    )
