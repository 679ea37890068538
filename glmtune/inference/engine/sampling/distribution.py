r"""Drawing tokens from the likeliest ones, with exactly the outcome of sorting the whole vocabulary.

Sorting 16 rows of 151,552 logits takes thirty times as long as finding the 256 largest of each; and nearly
always the token is among these. So a row is drawn from its *head*, its largest logits in order::

    order   | 0 1 2 ........ 255 |  the rest, unsorted
    weight  | sorted, exp((logit - largest) / temperature) |  only their sum is known
              ------ kept ------>|

Two things may go wrong, and both are seen: the filters may keep more than the head, or the random number may
point behind it. Such a row is looked at again with a longer head, in the end with all of it, and drawn with
the same number. Equal logits stand in the order of their ids; as the head's last ones may have equals outside
of it, the head counts only up to them.

Filters act in the order of transformers: temperature, top-k, top-p among what top-k left, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmtune.inference.requests.sampling import Sampling

HEADS = (256, 8192)
"""Likeliest tokens looked at first, and how many where these do not do. On one busy core, finding them in 16
rows of 151,552 logits takes 9 and 45 ms, and sorting the rows 300 ms."""


@dataclass(frozen=True, slots=True)
class Filters:
    """The settings of R rows, each ``[R, 1]`` and float64 but ``top_k``, which is int64 (0: all)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> Filters:
        """Gather the settings of rows."""
        rows = [(each.temperature, each.top_p, each.min_p) for each in samplings]
        numbers_R3 = torch.tensor(rows, dtype=torch.float64, device=device)
        # An int64 holds no number of tokens that a caller may have written; no vocabulary is that large.
        top_k = [min(each.top_k, 2**31) for each in samplings]
        temperature, top_p, min_p = numbers_R3.split(1, dim=1)
        return cls(temperature, torch.tensor(top_k, device=device).unsqueeze(1), top_p, min_p)

    def rows(self, index_R: Tensor) -> Filters:
        """Return some of the rows."""
        parts = (self.temperature, self.top_k, self.top_p, self.min_p)
        return Filters(*(part[index_R] for part in parts))


def draw(logits_RV: Tensor, filters: Filters, uniform_R1: Tensor, *, heads: Sequence[int] = HEADS) -> Tensor:
    """Draw a token per row by inverting the cumulative distribution, likeliest tokens first.

    Args:
        logits_RV: float32; minus infinity excludes a token, the largest is finite. Left as it is.
        filters: of the rows.
        uniform_R1: float64 random numbers, at least 0 and below 1.
        heads: lengths of the heads to try before all; the outcome does not depend on them.

    Returns:
        Token ids, int64 ``[R]``.
    """
    largest_R1 = logits_RV.amax(dim=-1, keepdim=True)
    # A temperature that is 0 in float32 would make NaN of the largest; this one is as certain.
    shares_RV = ((logits_RV - largest_R1) / filters.temperature.float().clamp(min=1e-30)).exp_()
    total_R1 = shares_RV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    chosen_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    left_L = torch.arange(len(logits_RV), device=logits_RV.device)
    for num in (*heads, logits_RV.shape[1]):
        logits_LV = logits_RV if len(left_L) == len(logits_RV) else logits_RV[left_L]
        head_LH, ids_LH = _head(logits_LV, num)
        is_whole = ids_LH.shape[1] == logits_RV.shape[1]
        place_L1, is_settled_L = _place(
            head_LH, filters.rows(left_L), uniform_R1[left_L], total_R1[left_L], is_whole
        )
        chosen_R[left_L] = ids_LH.gather(1, place_L1).squeeze(1)
        left_L = left_L[~is_settled_L]
        if is_whole or not len(left_L):
            break
    return chosen_R


def _head(logits_RV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits and their ids, ``[R, H]``, in order; equal ones by their ids."""
    if num >= logits_RV.shape[1]:
        return logits_RV.sort(dim=-1, descending=True, stable=True)
    # `topk` leaves the order of equal logits open, and half precision makes many of them.
    largest_RH, ids_RH = logits_RV.topk(num, dim=-1)
    ids_RH, order_RH = ids_RH.sort(dim=-1)
    largest_RH, back_RH = largest_RH.gather(1, order_RH).sort(dim=-1, descending=True, stable=True)
    return largest_RH, ids_RH.gather(1, back_RH)


def _place(
    sorted_RH: Tensor, filters: Filters, uniform_R1: Tensor, total_R1: Tensor, is_whole: bool
) -> tuple[Tensor, Tensor]:
    """Find the drawn place in the order of likelihood.

    Args:
        sorted_RH: logits, the largest first.
        filters: of the rows.
        uniform_R1: random numbers.
        total_R1: sum of the weights of the whole vocabulary, the largest's being 1.
        is_whole: these are all logits, not the head alone.

    Returns:
        Places, int64 ``[R, 1]``, and which rows are settled, bool ``[R]``: the others need all logits.
    """
    weight_RH = ((sorted_RH.double() - sorted_RH[:, :1].double()) / filters.temperature).exp()
    sum_RH = weight_RH.cumsum(dim=-1)
    length = sorted_RH.shape[1]
    # Beyond it there may be more; only `is_certain` reads what these counts say then.
    endless = length + 1 - int(is_whole)
    num_sure_R1 = (sorted_RH > sorted_RH[:, -1:]).sum(-1, keepdim=True)
    num_sure_R1 = torch.full_like(num_sure_R1, length) if is_whole else num_sure_R1

    has_top_k_R1 = (filters.top_k > 0) & (filters.top_k <= length)
    smallest_R1 = sorted_RH.gather(1, filters.top_k.clamp(1, length) - 1)
    num_k_R1 = (sorted_RH >= smallest_R1).sum(-1, keepdim=True)  # equals of the last one stay, too
    num_k_R1 = torch.where(has_top_k_R1, num_k_R1, endless)
    mass_R1 = torch.where(num_k_R1 > length, total_R1, sum_RH.gather(1, num_k_R1.clamp(max=length) - 1))

    # A token stays while those before it do not reach top_p yet.
    before_RH = torch.cat([torch.zeros_like(total_R1), sum_RH[:, :-1]], dim=1)
    num_p_R1 = (before_RH < filters.top_p * mass_R1).sum(-1, keepdim=True).clamp(min=1)
    num_p_R1 = torch.where(filters.top_p < 1, num_p_R1, endless)
    num_m_R1 = (weight_RH >= filters.min_p).sum(-1, keepdim=True)
    num_m_R1 = torch.where(filters.min_p > 0, num_m_R1, endless)
    num_R1 = torch.minimum(torch.minimum(num_k_R1, num_p_R1), num_m_R1)

    # What top-p keeps depends on what top-k left: a top-k that is not known makes both unknown.
    is_known_R1 = (num_R1 <= num_sure_R1) & ((filters.top_k == 0) | (num_k_R1 <= num_sure_R1))
    kept_R1 = torch.where(num_R1 > length, total_R1, sum_RH.gather(1, num_R1.clamp(max=length) - 1))
    drawn_R1 = uniform_R1 * kept_R1
    place_R1 = (sum_RH <= drawn_R1).sum(-1, keepdim=True)
    # Rounding may leave the sums below the drawn number: then the last token that has any weight.
    last_R1 = torch.minimum(num_R1, (weight_RH > 0).sum(-1, keepdim=True)) - 1
    # With no filter at all the sum of what is kept is known without the order of the rest.
    is_free_R1 = (filters.top_k == 0) & (filters.top_p >= 1) & (filters.min_p == 0)
    is_settled_R1 = is_known_R1 | (is_free_R1 & (place_R1 < num_sure_R1))
    return torch.minimum(place_R1, last_R1), is_settled_R1.squeeze(1)
