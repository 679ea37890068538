"""Any two of several runs: the difference of their averages with interval and test, and over benchmarks.

Three methods, by what the scores are::

    one answer each, 0 or 1        Tango's score interval; McNemar's exact test (micro), score test (macro)
    shares of several answers      Student's t of the paired differences, over subjects for a macro average
    clusters are named             Miller 2024, eq. 4, on the paired differences; Student's t over clusters

A difference is that of the first run minus the second, so positive where the first is better.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.compare.statistics.counts import PairCounts, Strata, count_pairs
from evaluation.compare.statistics.intervals import mcnemar, score_bounds, score_z, two_sided_p
from evaluation.metrics import MACRO, Outcome
from evaluation.statistics.adjusted import holm
from evaluation.statistics.clustered import CLUSTER, SUBJECT, clustered_mean, macro_weights
from evaluation.statistics.paired import paired_mean
from glmtune.errors import DataError

EXACT = "Tango's score interval, McNemar's exact test"
SCORE = "Tango's score interval and test, subjects weighing alike"
STUDENT = "Student's t of paired differences"
CLUSTERS = "t over clusters (Miller 2024, eq. 4)"
POOLED = "mean over benchmarks, variances of their intervals added; z test"


@dataclass(frozen=True, slots=True)
class Difference:
    """First run minus second, on the same questions.

    Attributes:
        difference_pp: percentage points.
        low_pp: lower end of its interval.
        high_pp: upper end.
        stderr_pp: its standard error; None where the questions do not tell.
        p_value: two-sided, of no difference.
        num_questions: n.
        num_clusters: G; None where no clusters are named.
        num_first: questions right in the first run alone; None where scores are shares.
        num_second: right in the second alone.
        method: of interval and test, in words.
        p_holm: corrected for all tests of its table.
    """

    difference_pp: float
    low_pp: float
    high_pp: float
    stderr_pp: float | None
    p_value: float
    num_questions: int
    num_clusters: int | None
    num_first: int | None
    num_second: int | None
    method: str
    p_holm: float | None = None


def difference_of(
    first: Sequence[Outcome],
    second: Sequence[Outcome],
    average: str,
    *,
    confidence: float = 0.95,
    cluster: str | None = None,
) -> Difference:
    """Compare two runs on the same questions.

    Args:
        first: one outcome per question, at least one.
        second: of the same questions in the same order; the subjects and clusters of ``first`` count.
        average: ``accuracy_micro`` or ``accuracy_macro``.
        confidence: of the two-sided interval.
        cluster: ``subject`` or ``cluster``; None takes every question for itself.

    Raises:
        DataError: the questions name no cluster, or one alone.
    """
    subjects = [outcome.subject for outcome in first]
    changes = [one.value - two.value for one, two in zip(first, second, strict=True)]
    groups = _groups(subjects) if average == MACRO else [list(range(len(changes)))]
    usual = paired_mean(changes, groups, confidence=confidence)
    stderr_pp = None if usual is None else 100 * usual.stderr
    is_binary = all(outcome.score is None for outcome in (*first, *second))
    flips = (
        (sum(change > 0 for change in changes), sum(change < 0 for change in changes))
        if is_binary
        else (None, None)
    )
    if cluster is not None:
        return _clustered(first, changes, average, confidence, cluster, flips)
    if is_binary:
        return _binary(first, second, average, confidence, stderr_pp, flips)
    if usual is None:  # one question: nothing tells how much it could have been otherwise
        return Difference(
            100 * sum(changes), -100.0, 100.0, None, 1.0, len(changes), None, None, None, STUDENT
        )
    return Difference(
        100 * usual.mean,
        100 * usual.low,
        100 * usual.high,
        stderr_pp,
        usual.p_value,
        len(changes),
        None,
        None,
        None,
        STUDENT,
    )


def _groups(subjects: Sequence[str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for place, subject in enumerate(subjects):
        found.setdefault(subject, []).append(place)
    return list(found.values())


def _binary(
    first: Sequence[Outcome],
    second: Sequence[Outcome],
    average: str,
    confidence: float,
    stderr_pp: float | None,
    flips: tuple[int | None, int | None],
) -> Difference:
    # The two-run comparison pairs by subject and index; here the pairing is by place, whatever the names.
    renamed = [
        dataclasses.replace(two, subject=one.subject, index=one.index)
        for one, two in zip(first, second, strict=True)
    ]
    counts = count_pairs(first, renamed)
    strata = (Strata.macro if average == MACRO else Strata.micro)(counts.values())
    bounds = score_bounds(strata, (1 + confidence) / 2)
    p_value = (
        two_sided_p(score_z(strata, 0.0)) if average == MACRO else mcnemar(sum(counts.values(), PairCounts()))
    )
    return Difference(
        100 * strata.drop,
        100 * bounds.low,
        100 * bounds.high,
        stderr_pp,
        p_value,
        len(first),
        None,
        *flips,
        SCORE if average == MACRO else EXACT,
    )


def _clustered(
    first: Sequence[Outcome],
    changes: Sequence[float],
    average: str,
    confidence: float,
    cluster: str,
    flips: tuple[int | None, int | None],
) -> Difference:
    names = [outcome.subject if cluster == SUBJECT else outcome.cluster for outcome in first]
    if cluster == CLUSTER and not all(names):
        raise DataError(
            f"`cluster` is `{cluster}`, but {names.count('')} of {len(names)} questions name none. Only"
            " benchmarks described with a `cluster` column do; use `cluster=subject`, or leave it out."
        )
    weights = macro_weights([outcome.subject for outcome in first]) if average == MACRO else None
    found = clustered_mean(changes, names, weights=weights, confidence=confidence)
    if found is None:
        raise DataError(
            f"`cluster` is `{cluster}`, but all {len(names)} questions are of one cluster, `{names[0]}`, and"
            " one alone says nothing of others. Leave it out."
        )
    return Difference(
        100 * found.mean,
        100 * found.low,
        100 * found.high,
        100 * found.stderr,
        found.p_value,
        found.num_questions,
        found.num_clusters,
        *flips,
        CLUSTERS,
    )


@dataclass(frozen=True, slots=True)
class Pooled:
    """One pair of runs over several benchmarks, each a stratum.

    Attributes:
        mean: mean of the benchmarks' differences, each weighing the same, with interval and z test.
        p_exact: of McNemar's exact test on the flips of all benchmarks together, in which every flipped
            question weighs the same; None where scores are shares or clusters are named.
        num_benchmarks: how many.
    """

    mean: Difference
    p_exact: float | None
    num_benchmarks: int


def pool(differences: Sequence[Difference], *, confidence: float = 0.95) -> Pooled:
    """Test one pair of runs over several benchmarks.

    The benchmarks' questions are different ones, so their differences are independent and variances add. They
    are not added as standard errors: that of a benchmark without a flip is 0, as if no further question could
    flip, and those of benchmarks with few flips are too small. The intervals know better, so the variances
    are recovered from them, for each side by itself (MOVER, method of variance estimates recovery)::

        low end    mean - sqrt(sum((difference - low)^2)) / k        high end likewise

    The z test takes the variance of the side on which 0 lies, so that it and the interval agree.

    If there is no difference, a flip goes either way with the same chance in every benchmark, so the exact
    test may count them together: nothing is assumed about how hard a benchmark is.

    Args:
        differences: one per benchmark, with intervals of the same confidence.
        confidence: of all intervals, two-sided.

    Source:
        Tang 2021, arXiv:2110.12636 (strata), after Newcombe 1998 and Zou and Donner 2008. Miller 2024,
        arXiv:2411.00640, adds standard errors; Bowyer et al. 2025, arXiv:2503.01747, show how far too small
        these are near 0 and 100 %.
        For the exact test: Mantel and Haenszel 1959 in its exact form for matched pairs, the binomial test
        on the discordant pairs of all strata.
    """
    from scipy.stats import norm

    count = len(differences)
    mean = sum(each.difference_pp for each in differences) / count
    below = math.hypot(*(each.difference_pp - each.low_pp for each in differences)) / count
    above = math.hypot(*(each.high_pp - each.difference_pp for each in differences)) / count
    errors = [each.stderr_pp for each in differences]
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / count if len(known) == count else None
    towards_0 = below if mean > 0 else above
    z = float(norm.ppf((1 + confidence) / 2))
    p_value = two_sided_p(z * mean / towards_0) if mean else 1.0
    flips = [(each.num_first, each.num_second) for each in differences if each.num_clusters is None]
    first = [one for one, _ in flips if one is not None]
    second = [two for _, two in flips if two is not None]
    is_exact = len(first) == len(second) == count
    clusters = [each.num_clusters for each in differences if each.num_clusters is not None]
    return Pooled(
        Difference(
            mean,
            max(-100.0, mean - below),
            min(100.0, mean + above),
            stderr,
            p_value,
            sum(each.num_questions for each in differences),
            sum(clusters) if len(clusters) == count else None,
            sum(first) if is_exact else None,
            sum(second) if is_exact else None,
            POOLED,
        ),
        mcnemar(PairCounts(lost=sum(first), gained=sum(second))) if is_exact else None,
        count,
    )


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Return differences with their p-values corrected as one family, by Holm's method."""
    adjusted = holm([each.p_value for each in differences])
    return [
        dataclasses.replace(each, p_holm=p_value) for each, p_value in zip(differences, adjusted, strict=True)
    ]
