"""Paired differences of scores, and any two of several runs: beside scipy, exact counting and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from evaluation.compare.statistics.counts import PairCounts, Strata
from evaluation.compare.statistics.intervals import score_bounds
from evaluation.compare.statistics.pairwise import corrected, difference_of, pool
from evaluation.metrics import MACRO, MICRO, Outcome
from evaluation.statistics.adjusted import holm
from evaluation.statistics.paired import paired_mean
from glmtune.errors import DataError


def rows(scores: list[float], subjects: str | None = None, *, shares: bool = False) -> list[Outcome]:
    names = subjects or "a" * len(scores)
    return [
        Outcome(name, place, score == 1, score=score if shares else None, cluster=f"{name}{place // 2}")
        for place, (score, name) in enumerate(zip(scores, names, strict=True))
    ]


FIRST = [1, 1, 1, 0, 1, 1, 0, 1, 1, 1]
SECOND = [1, 0, 0, 0, 0, 1, 1, 0, 1, 0]


def test_shares_are_compared_by_the_paired_t_test() -> None:
    one = [0.5, 1.0, 0.25, 0.75, 0.0, 1.0]
    two = [0.25, 1.0, 0.0, 0.5, 0.25, 0.5]
    found = difference_of(rows(one, shares=True), rows(two, shares=True), MICRO, confidence=0.9)
    expected = stats.ttest_rel(one, two)
    low, high = expected.confidence_interval(0.9)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low_pp, found.high_pp) == (pytest.approx(100 * low), pytest.approx(100 * high))
    assert found.stderr_pp == pytest.approx(100 * np.std(np.subtract(one, two), ddof=1) / math.sqrt(6))
    assert (found.num_first, found.num_clusters, found.num_questions) == (None, None, 6)


def test_right_and_wrong_are_compared_exactly() -> None:
    found = difference_of(rows(FIRST), rows(SECOND), MICRO)
    assert (found.num_first, found.num_second, found.difference_pp) == (5, 1, pytest.approx(40))
    assert found.p_value == pytest.approx(stats.binomtest(5, 6).pvalue)
    bounds = score_bounds(Strata.micro([PairCounts(both=3, lost=5, gained=1, neither=1)]), 0.975)
    assert (found.low_pp, found.high_pp) == (
        pytest.approx(100 * bounds.low),
        pytest.approx(100 * bounds.high),
    )
    other = difference_of(rows(SECOND), rows(FIRST), MICRO)
    assert other.difference_pp == pytest.approx(-40)
    assert other.low_pp == pytest.approx(-found.high_pp, abs=1e-6)


def test_macro_weighs_subjects_alike() -> None:
    found = difference_of(rows(FIRST, "aaaabbbbbb"), rows(SECOND, "aaaabbbbbb"), MACRO)
    assert found.difference_pp == pytest.approx(100 * (2 / 4 + 2 / 6) / 2)
    strata = paired_mean(np.subtract(FIRST, SECOND).tolist(), [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]])
    assert strata is not None
    parts = [np.var(np.subtract(FIRST, SECOND)[place], ddof=1) for place in (slice(0, 4), slice(4, 10))]
    assert strata.stderr == pytest.approx(math.sqrt(parts[0] / 4 / 4 + parts[1] / 6 / 4))
    assert found.stderr_pp == pytest.approx(100 * strata.stderr)


def test_single_questions_of_subjects_stand_together() -> None:
    found = paired_mean([0.5, -0.5, 0.1, 0.3], [[0], [1], [2, 3]])
    assert found is not None
    assert found.mean == pytest.approx((0.5 - 0.5 + 0.2) / 3)
    assert paired_mean([0.5], [[0]]) is None
    alone = difference_of(rows([0.5], shares=True), rows([0.25], shares=True), MICRO)
    assert (alone.low_pp, alone.high_pp, alone.p_value) == (-100, 100, 1)


def test_equal_differences_are_no_certainty() -> None:
    """Two questions that both flip prove nothing; a hundred do. No difference at all bounds how many differ."""
    for count, is_sure in ((2, False), (5, False), (6, True), (100, True)):
        found = difference_of(rows([1.0] * count, shares=True), rows([0.0] * count, shares=True), MICRO)
        assert found.p_value == pytest.approx(stats.binomtest(count, count).pvalue), "the sign test's"
        assert (found.low_pp > 0) is (found.p_value < 0.05) is is_sure
        assert found.high_pp == pytest.approx(100)
    same = difference_of(rows([0.5] * 100, shares=True), rows([0.5] * 100, shares=True), MICRO)
    exact = stats.binomtest(0, 100).proportion_ci(0.95).high
    assert (same.low_pp, same.high_pp, same.p_value) == (
        pytest.approx(-100 * exact),
        pytest.approx(100 * exact),
        1.0,
    )


@pytest.mark.parametrize("cluster", ["subject", "cluster"])
def test_clusters_of_differences(cluster: str) -> None:
    names = "aabbccddee"
    found = difference_of(rows(FIRST, names), rows(SECOND, names), MICRO, cluster=cluster)
    changes = np.subtract(FIRST, SECOND).astype(float)
    moved = (changes - changes.mean()).reshape(5, 2).sum(axis=1) if cluster == "subject" else None
    assert found.num_clusters == 5
    if moved is not None:
        alone = ((changes - changes.mean()) ** 2).sum()
        variance = (alone / 9 / 10) + ((moved**2).sum() - alone) / 100
        assert found.stderr_pp == pytest.approx(100 * math.sqrt(variance))
    assert "clusters" in found.method


def test_clusters_that_are_not_there_are_refused() -> None:
    unnamed = [Outcome("a", place, True) for place in range(4)]
    with pytest.raises(DataError, match=r"`cluster` is `cluster`, but 4 of 4 questions name none"):
        difference_of(unnamed, unnamed, MICRO, cluster="cluster")
    with pytest.raises(DataError, match=r"all 4 questions are of one cluster, `a`"):
        difference_of(unnamed, unnamed, MICRO, cluster="subject")


def test_the_pooled_test_is_exact_over_strata() -> None:
    """All ways in which the flips of two benchmarks can fall, each as likely as any other."""
    found = [
        difference_of(rows([1, 1, 1, 0, 1]), rows([0, 0, 0, 1, 1]), MICRO),
        difference_of(rows([1, 1, 0]), rows([0, 0, 0]), MICRO),
    ]
    pooled = pool(found)
    seen = 3 + 2
    ways = [sum(way) for way in itertools.product((0, 1), repeat=6)]
    two_sided = sum(way >= seen or way <= 6 - seen for way in ways) / len(ways)
    assert pooled.p_exact == pytest.approx(two_sided)
    assert pooled.mean.difference_pp == pytest.approx((40 + 200 / 3) / 2)
    assert (pooled.mean.num_questions, pooled.num_benchmarks) == (8, 2)
    errors = [each.stderr_pp or 0 for each in found]
    assert pooled.mean.stderr_pp == pytest.approx(math.hypot(*errors) / 2)


def test_the_pooled_interval_adds_the_variances_of_the_intervals() -> None:
    found = [
        difference_of(rows([1, 1, 1, 0, 1]), rows([0, 0, 0, 1, 1]), MICRO, confidence=0.9),
        difference_of(rows([1, 1, 0]), rows([0, 0, 0]), MICRO, confidence=0.9),
    ]
    pooled = pool(found, confidence=0.9).mean
    below = math.hypot(*(each.difference_pp - each.low_pp for each in found)) / 2
    above = math.hypot(*(each.high_pp - each.difference_pp for each in found)) / 2
    assert (pooled.low_pp, pooled.high_pp) == pytest.approx(
        (pooled.difference_pp - below, pooled.difference_pp + above)
    )
    # 0 is below: the test takes the variance of that side, so that it and the interval agree.
    z = pooled.difference_pp / (below / stats.norm.ppf(0.95))
    assert pooled.p_value == pytest.approx(2 * stats.norm.sf(z))
    assert (pooled.p_value < 0.1) == (pooled.low_pp > 0)


def test_a_benchmark_without_a_flip_is_no_certainty() -> None:
    silent = difference_of(rows([1] * 50), rows([1] * 50), MICRO)
    assert silent.stderr_pp == 0
    both = pool([silent, silent]).mean
    assert both.low_pp < -1 < 1 < both.high_pp
    assert both.p_value == 1
    flipped = difference_of(rows([1] * 6 + [0] * 44), rows([0] * 50), MICRO)
    one_of_two = pool([flipped, silent]).mean
    assert one_of_two.high_pp - one_of_two.low_pp > (flipped.high_pp - flipped.low_pp) / 2
    alike = [difference_of(rows([1] * 3), rows([0] * 3), MICRO)] * 2
    assert pool(alike).mean.p_value > 0.001, "six questions that all flip have no spread, and are still six"
    assert pool(alike).mean.high_pp == 100


@pytest.mark.parametrize(
    ("benchmarks", "most"),
    [
        pytest.param(((0.7, 0.6, 150), (0.5, 0.5, 80)), 0.98, id="middle"),
        # Added standard errors hold it in 72 of 100: many draws have no flip at all in one of the two.
        pytest.param(((1.0, 0.99, 60), (1.0, 0.99, 60)), 1.0, id="near-100-percent"),
    ],
)
def test_the_mean_over_benchmarks_holds_the_truth_as_often_as_it_says(
    benchmarks: tuple[tuple[float, float, int], ...], most: float
) -> None:
    generator, held = np.random.default_rng(7), 0
    truth = 100 * sum(before - after for before, after, _ in benchmarks) / len(benchmarks)
    for _ in range(400):
        found = []
        for before, after, size in benchmarks:
            one, two = (generator.random(size) < chance for chance in (before, after))
            found.append(difference_of(rows(one.tolist()), rows(two.tolist()), MICRO))
        pooled = pool(found).mean
        held += pooled.low_pp <= truth <= pooled.high_pp
    assert 0.92 <= held / 400 <= most


def test_holm_is_over_all_pairs() -> None:
    found = [difference_of(rows(FIRST), rows(SECOND), MICRO), difference_of(rows(FIRST), rows(FIRST), MICRO)]
    done = corrected(found)
    assert [each.p_holm for each in done] == pytest.approx(holm([each.p_value for each in found]))
    assert done[0].p_holm == pytest.approx(min(1.0, 2 * found[0].p_value))
