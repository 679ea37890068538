"""Drawing from the likeliest tokens has the outcome of drawing from all, and the distribution of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmtune.inference.engine.sampling.distribution import Filters, draw
from glmtune.inference.requests.sampling import Sampling

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=1e-5),
    Sampling(temperature=1e-300),
    Sampling(temperature=100.0),
    Sampling(temperature=0.8, top_p=0.8),
    Sampling(temperature=5.0, top_p=0.999),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=7, top_p=0.5),
    Sampling(temperature=2.0, top_k=90, top_p=0.9),
    Sampling(temperature=2.0, top_k=10**30, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=3.0, min_p=1e-6),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.1),
]


def warped(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that transformers samples from, float64 ``[V]``."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(min_p=sampling.min_p))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    # The largest is taken off first, so that dividing by a tiny temperature does not overflow.
    scores = (logits_V.double() - logits_V.max().double()).unsqueeze(0)
    return warpers(ids, scores)[0].softmax(dim=-1)  # pyright: ignore[reportArgumentType]


def inverse(probabilities_V: Tensor, uniform_R: Tensor) -> Tensor:
    """The tokens at which the sum of probabilities, likeliest first, passes the numbers."""
    ordered, ids = probabilities_V.sort(descending=True, stable=True)
    place = torch.searchsorted(ordered.cumsum(0), uniform_R, right=True)
    return ids[place.clamp(max=int((ordered > 0).sum()) - 1)]


def logits_of(kind: str, vocab: int) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    logits_V = torch.randn(vocab, generator=generator) * (0.01 if kind == "flat" else 4.0)
    if kind == "banned":
        logits_V[torch.randperm(vocab, generator=generator)[: vocab // 2]] = -torch.inf
    return logits_V


@pytest.mark.parametrize("kind", ["peaked", "flat", "banned"])
@pytest.mark.parametrize("head", [8, 64, 2000])
def test_draw_equals_transformers(kind: str, head: int):
    logits_V = logits_of(kind, 1500)
    uniform_R = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sampling in SETTINGS:
        filters = Filters.of([sampling] * len(uniform_R), torch.device("cpu"))
        drawn = draw(
            logits_V.expand(len(uniform_R), -1), filters, uniform_R[:, None], heads=(head // 8, head)
        )
        expected = inverse(warped(logits_V, sampling), uniform_R)
        # A number within rounding of a border may fall on either side.
        assert int((drawn != expected).sum()) <= 1, sampling


@pytest.mark.parametrize("head", [1, 5, 64, 256])
def test_draw_does_not_depend_on_the_head_where_logits_are_equal(head: int):
    # Few different values: groups of equals span the end of every head.
    logits_V = torch.randint(0, 6, (800,), generator=torch.Generator().manual_seed(2)).float()
    uniform_R1 = torch.rand(300, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for sampling in SETTINGS:
        filters = Filters.of([sampling] * len(uniform_R1), torch.device("cpu"))
        rows = logits_V.expand(len(uniform_R1), -1)
        whole = draw(rows, filters, uniform_R1, heads=())
        assert torch.equal(draw(rows, filters, uniform_R1, heads=(head,)), whole), sampling


def test_draw_gives_rows_of_unlike_settings_what_each_gets_alone():
    generator = torch.Generator().manual_seed(4)
    logits_RV = torch.randn(len(SETTINGS), 3000, generator=generator) * 3
    uniform_R1 = torch.rand(len(SETTINGS), 1, generator=generator, dtype=torch.float64)
    cpu = torch.device("cpu")
    together = draw(logits_RV, Filters.of(SETTINGS, cpu), uniform_R1)
    alone = [
        draw(logits_RV[row : row + 1], Filters.of([sampling], cpu), uniform_R1[row : row + 1]).item()
        for row, sampling in enumerate(SETTINGS)
    ]
    assert together.tolist() == alone


def test_draw_follows_the_distribution():
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    sampling = Sampling(temperature=1.3, top_k=5, top_p=0.97)
    num = 20_000
    uniform_R1 = torch.rand(num, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    drawn = draw(logits_V.expand(num, -1), Filters.of([sampling] * num, torch.device("cpu")), uniform_R1)
    expected = warped(logits_V, sampling) * num
    counts = torch.bincount(drawn, minlength=6)
    assert not counts[expected == 0].any()
    chi_square = ((counts - expected).square() / expected)[expected > 0].sum()
    assert float(chi_square) < 18.5  # 0.1 % of a chi-square of 4 degrees of freedom


def test_draw_leaves_the_logits_as_they_were():
    logits_RV = torch.randn(2, 600)
    before = logits_RV.clone()
    filters = Filters.of([Sampling(temperature=50.0, top_p=0.9)] * 2, torch.device("cpu"))
    draw(logits_RV, filters, torch.tensor([[0.1], [0.999]], dtype=torch.float64))
    assert torch.equal(logits_RV, before)
