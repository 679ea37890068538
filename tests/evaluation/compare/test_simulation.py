"""Coverage of the intervals and error rates of the gate, over many repetitions with a known drop.

400 repetitions tell a wrong interval from a right one in seconds. The 2,000 of the marked form have the narrow
bands and are run when ``intervals.py``, ``counts.py`` or ``gate.py`` change.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.compare.settings import GateSettings
from evaluation.compare.statistics.counts import PairCounts, Strata
from evaluation.compare.statistics.gate import judge_drop
from evaluation.compare.statistics.intervals import bootstrap

MANY = 2000
RESAMPLES = 2000
CEVAL_SIZES = [12, 16, 18, 19, 20, 21, 22, 23, 24, 25, 29, 31, 33, 37, 46, 49, 55] * 3 + [25]


@pytest.fixture(params=[400, pytest.param(MANY, marks=pytest.mark.slow)])
def repetitions(request) -> int:
    return request.param


def band(width: float, repetitions: int) -> float:
    """Widen what is allowed with MANY repetitions as the standard error of a rate widens with fewer."""
    return width * math.sqrt(MANY / repetitions)


def rates(lost: float, gained: float, right: float = 0.5) -> list[float]:
    both = right - lost
    return [both, lost, gained, 1 - both - lost - gained]


def draws(
    size: int, cells: list[float], generator: np.random.Generator, repetitions: int
) -> list[PairCounts]:
    return [PairCounts(*map(int, each)) for each in generator.multinomial(size, cells, repetitions)]


@pytest.mark.parametrize(
    ("size", "lost", "gained"),
    [(1346, 0.0915, 0.0585), (14042, 0.055, 0.032), (1319, 0.05, 0.05), (500, 0.12, 0.08)],
)
def test_micro_interval_covers_its_level(size, lost, gained, repetitions):
    generator = np.random.default_rng(11)
    covered = 0
    for number, counts in enumerate(draws(size, rates(lost, gained), generator, repetitions)):
        found = bootstrap(Strata.micro([counts]), confidence=0.95, num_resamples=RESAMPLES, seed=number)
        covered += found.drop.low - 1e-12 <= lost - gained <= found.drop.high + 1e-12
    assert covered / repetitions == pytest.approx(0.95, abs=band(0.01, repetitions))


def test_macro_interval_covers_its_level(repetitions):
    """52 subjects of C-Eval's sizes, each with rates of its own; the drop is the mean of theirs."""
    generator = np.random.default_rng(12)
    cells = [rates(lost, gained) for lost, gained in generator.uniform(0.03, 0.15, (len(CEVAL_SIZES), 2))]
    true_drop = float(np.mean([each[1] - each[2] for each in cells]))
    samples = [
        draws(size, each, generator, repetitions) for size, each in zip(CEVAL_SIZES, cells, strict=True)
    ]
    covered = 0
    for number in range(repetitions):
        strata = Strata.macro([subject[number] for subject in samples])
        found = bootstrap(strata, confidence=0.95, num_resamples=RESAMPLES, seed=number)
        covered += found.drop.low <= true_drop <= found.drop.high
    assert covered / repetitions == pytest.approx(0.95, abs=band(0.01, repetitions))


@pytest.mark.parametrize("size", [300, 1346, 14042])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_gate_errs_at_its_nominal_level_both_ways(size, confidence, repetitions):
    """A candidate exactly at the tolerance passes, and is failed, in one of twenty (ten) runs."""
    generator = np.random.default_rng(13)
    gate = GateSettings(max_drop_pp=2.0, confidence=confidence)
    found = [
        judge_drop(Strata.micro([counts]), "micro", gate).outcome
        for counts in draws(size, rates(0.085, 0.065), generator, repetitions)
    ]
    for outcome in ("within", "exceeds"):
        rate = found.count(outcome) / repetitions
        assert rate == pytest.approx(1 - confidence, abs=band(0.015, repetitions)), outcome


def test_the_gate_errs_at_its_nominal_level_on_a_macro_average(repetitions):
    generator = np.random.default_rng(14)
    gate = GateSettings(max_drop_pp=2.0)
    samples = [draws(size, rates(0.085, 0.065), generator, repetitions) for size in CEVAL_SIZES]
    found = [
        judge_drop(Strata.macro([subject[number] for subject in samples]), "macro", gate).outcome
        for number in range(repetitions)
    ]
    assert found.count("within") / repetitions == pytest.approx(0.05, abs=band(0.015, repetitions))
    assert found.count("exceeds") / repetitions == pytest.approx(0.05, abs=band(0.015, repetitions))


def test_a_worse_candidate_passes_less_often(repetitions):
    generator = np.random.default_rng(15)
    gate = GateSettings(max_drop_pp=2.0)
    found = [
        judge_drop(Strata.micro([counts]), "micro", gate).outcome
        for counts in draws(1346, rates(0.095, 0.055), generator, repetitions)
    ]
    assert found.count("within") / repetitions < band(0.005, repetitions)
