"""Errors from clusters: the paper's sum over pairs, limits that must hold, coverage, and a bootstrap beside."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics.clustered import clustered_mean, macro_weights


def by_pairs(scores: list[float], clusters: list[str]) -> float:
    """Equation 4 of Miller 2024 as it is printed: a sum over all pairs of one cluster."""
    count, mean = len(scores), sum(scores) / len(scores)
    alone = sum((score - mean) ** 2 for score in scores) / (count - 1) / count
    pairs = sum(
        (scores[i] - mean) * (scores[j] - mean)
        for i in range(count)
        for j in range(count)
        if i != j and clusters[i] == clusters[j]
    )
    return math.sqrt(alone + pairs / count**2)


SCORES = [1.0, 1.0, 0.0, 0.5, 0.0, 1.0, 0.25]
CLUSTERS = ["a", "a", "b", "b", "b", "c", "d"]


def test_the_error_is_that_of_the_paper() -> None:
    found = clustered_mean(SCORES, CLUSTERS)
    assert found is not None
    assert found.stderr == pytest.approx(by_pairs(SCORES, CLUSTERS), rel=1e-12)
    assert found.stderr_usual == pytest.approx(np.std(SCORES, ddof=1) / math.sqrt(7), rel=1e-12)
    assert (found.num_questions, found.num_clusters) == (7, 4)
    half = stats.t.ppf(0.975, 3) * found.stderr * math.sqrt(4 / 3)
    assert (found.low, found.high) == (pytest.approx(found.mean - half), pytest.approx(found.mean + half))
    assert found.design_effect == pytest.approx((found.stderr / found.stderr_usual) ** 2)


def test_clusters_of_one_are_no_clusters() -> None:
    found = clustered_mean(SCORES, list(range(7)))
    assert found is not None
    assert found.stderr == pytest.approx(found.stderr_usual, rel=1e-12)


def test_copies_of_questions_tell_nothing_new() -> None:
    """Every question asked ten times: the error stays nearly that of the seven, the usual one shrinks."""
    copied = clustered_mean(SCORES * 10, list(range(7)) * 10)
    assert copied is not None
    assert copied.stderr == pytest.approx(np.std(SCORES) / math.sqrt(7), rel=0.01)
    assert copied.stderr_usual < copied.stderr / 3


def test_subjects_of_a_macro_average_are_the_spread_of_their_means() -> None:
    subjects = ["a"] * 4 + ["b"] * 2 + ["c"] * 3
    scores = [1, 0, 1, 1, 0, 0, 1, 0, 1]
    found = clustered_mean(scores, subjects, weights=macro_weights(subjects))
    means = [3 / 4, 0, 2 / 3]
    assert found is not None
    assert found.mean == pytest.approx(np.mean(means))
    wide = stats.t.ppf(0.975, 2) * np.std(means, ddof=1) / math.sqrt(3)
    assert found.high - found.low == pytest.approx(2 * wide, rel=1e-9)


def test_one_cluster_says_nothing() -> None:
    assert clustered_mean([1.0, 0.0], ["a", "a"]) is None


def test_no_spread_is_no_difference() -> None:
    found = clustered_mean([0.0] * 6, ["a", "a", "b", "b", "c", "c"])
    assert found is not None
    assert (found.stderr, found.p_value, found.design_effect) == (0.0, 1.0, None)
    found = clustered_mean([0.5] * 6, ["a", "a", "b", "b", "c", "c"])
    assert found is not None
    assert found.p_value == pytest.approx(2 / 1.5**3), "three clusters are no certainty"
    assert found.low < 0 < 0.5 < found.high < 1
    right = clustered_mean([1.0] * 6, ["a", "a", "b", "b", "c", "c"], lowest=0.0)
    assert right is not None
    assert (right.low, right.high) == (pytest.approx(0.025 ** (1 / 3)), 1.0), "exact bound of 3 of 3"


def simulated(generator: np.random.Generator, num_clusters: int, size: int) -> tuple[list[float], list[int]]:
    """Questions about documents: a document is easy or hard, and its questions with it."""
    ease = generator.beta(1, 1, num_clusters)
    scores = (generator.random((num_clusters, size)) < ease[:, None]).astype(float)
    return scores.ravel().tolist(), np.repeat(np.arange(num_clusters), size).tolist()


@pytest.mark.parametrize("num_clusters", [8, 40], ids=["few", "many"])
def test_intervals_hold_the_truth_as_often_as_they_say(num_clusters: int) -> None:
    generator, held, usual = np.random.default_rng(4), 0, 0
    for _ in range(600):
        found = clustered_mean(*simulated(generator, num_clusters, 12))
        assert found is not None
        held += found.low <= 0.5 <= found.high
        usual += abs(found.mean - 0.5) <= 1.96 * found.stderr_usual
    assert 0.92 <= held / 600 <= 0.98
    assert usual / 600 < 0.82, "without clusters the interval is far too short"


def test_a_bootstrap_of_clusters_agrees() -> None:
    scores, clusters = simulated(np.random.default_rng(5), 60, 8)
    found = clustered_mean(scores, clusters)
    means = np.array(scores).reshape(60, 8).mean(axis=1)
    drawn = np.random.default_rng(6).choice(means, (4000, 60)).mean(axis=1)
    assert found is not None
    assert found.stderr == pytest.approx(drawn.std(), rel=0.06)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.012), pytest.approx(high, abs=0.012))
