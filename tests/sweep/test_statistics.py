"""Which point is the best: held to SciPy, to integrals, and to sweeps whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from glmtune.sweep.space import Point
from glmtune.sweep.statistics import PointResult, Ranking, rank

VALUES = {"a": [1.0, 1.2, 1.1], "b": [1.3, 1.9, 1.4], "c": [2.0, 2.1, 2.05], "d": [1.15, 1.05, 1.4]}


def result(name: str, values: list[float], *failed: int) -> PointResult:
    return PointResult(Point((("p", name),)), dict(enumerate(values)), dict.fromkeys(failed, "broken"))


def ranked(values: dict[str, list[float]], *, larger: bool = False) -> Ranking:
    return rank([result(name, each) for name, each in values.items()], larger_is_better=larger)


def names(ranking: Ranking) -> str:
    return "".join(each.point.values[0][1] for each in ranking.results)


@pytest.mark.parametrize("larger", [False, True], ids=["lower is better", "higher is better"])
def test_the_order_intervals_and_p_values_are_those_of_scipy(larger: bool) -> None:
    ranking = ranked(VALUES, larger=larger)
    assert names(ranking) == ("cbda" if larger else "adbc")
    for each in ranking.results:
        mine = VALUES[each.point.values[0][1]]
        low, high = stats.t.interval(0.95, 2, np.mean(mine), stats.sem(mine))
        assert (each.low, each.high) == (pytest.approx(low), pytest.approx(high))
        others = [other for name, other in VALUES.items() if name != each.point.values[0][1]]
        side = "less" if larger else "greater"
        found = [stats.ttest_ind(mine, other, equal_var=False, alternative=side).pvalue for other in others]
        assert each.p_value == pytest.approx(min(1.0, 3 * min(found)), abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_chance_of_two_points_is_an_integral(n: int) -> None:
    generator = np.random.default_rng(n)
    a, b = generator.normal(0, 1, n), generator.normal(0.7, 2, n)

    def above(x: float) -> float:  # P(mean of b lies above x) times the density of a's mean at x
        density = stats.t.pdf((x - a.mean()) / stats.sem(a), n - 1) / stats.sem(a)
        return density * stats.t.sf((x - b.mean()) / stats.sem(b), n - 1)

    expected = integrate.quad(above, -math.inf, math.inf)[0]
    first = ranked({"a": list(a), "b": list(b)})
    chances = {each.point.values[0][1]: each.chance for each in first.results}
    assert chances["a"] == pytest.approx(expected, abs=0.015)
    assert chances["a"] + chances["b"] == pytest.approx(1)


def test_the_set_holds_the_best_one_as_often_as_it_says() -> None:
    """All points are alike: each is a best one, and is left out in at most one sweep of twenty."""
    generator = np.random.default_rng(1)
    kept, luck, honest, sweeps = 0, [], [], 300
    for _ in range(sweeps):
        values = generator.normal(0, generator.uniform(0.2, 3, size=(6, 1)), size=(6, 3))
        ranking = ranked({str(number): list(row) for number, row in enumerate(values)})
        kept += next(bool(each.may_be_best) for each in ranking.results if each.point.values[0][1] == "0")
        luck.append(ranking.results[0].mean)
        honest.append(ranking.left_out)
    assert kept / sweeps > 0.93
    assert np.mean(luck) < -0.5, "the best of many looks better than any is"
    assert abs(np.mean(honest)) < 0.25, "what the others chose is no better on a new seed"


def test_a_point_that_is_far_better_is_the_only_candidate() -> None:
    ranking = ranked({"a": [1.0, 1.01, 1.02], "b": [3.0, 3.02, 3.01], "c": [4.0, 4.1, 4.2]})
    assert [each.may_be_best for each in ranking.results] == [True, False, False]
    assert ranking.num_candidates == 1
    assert ranking.results[0].chance == pytest.approx(1, abs=0.005)
    assert ranking.left_out == pytest.approx(1.01)


def test_one_seed_tells_nothing() -> None:
    ranking = ranked({"a": [2.0], "b": [1.0]})
    assert names(ranking) == "ba"
    for each in ranking.results:
        assert (each.low, each.high, each.chance, each.p_value, each.may_be_best) == (None,) * 5
    assert ranking.left_out is None


def test_a_point_that_failed_once_is_not_the_best() -> None:
    ranking = rank(
        [result("a", [1.0, 1.1], 2), result("b", [2.0, 2.1, 2.2]), result("c", [], 0, 1, 2)],
        larger_is_better=False,
    )
    assert names(ranking) == "bac"
    assert ranking.best is not None
    assert math.isnan(ranking.results[2].mean)
    assert ranking.results[2].may_be_best is None
    nothing = rank([result("c", [], 0)], larger_is_better=False)
    assert nothing.best is None


def test_seeds_that_make_no_difference() -> None:
    ranking = ranked({"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [2.0, 2.0]})
    assert [each.p_value for each in ranking.results] == [1, 1, 0]
    assert [each.chance for each in ranking.results] == [pytest.approx(0.5), pytest.approx(0.5), 0]
