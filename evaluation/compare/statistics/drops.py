"""The paired comparison of two runs: what a candidate lost, how surely, and where.

Start here: ``compare_outcomes`` counts pairs (``counts``), puts intervals around every drop (``intervals``)
and asks for the verdict on the judged average (``gate``). Micro and macro average differ in the weight of a
question only, so both go through the same functions, as ``Strata``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.compare.settings import HEADLINE, GateSettings
from evaluation.compare.statistics.counts import PairCounts, Strata, count_pairs
from evaluation.compare.statistics.gate import Verdict, judge_drop
from evaluation.compare.statistics.intervals import (
    Resampled,
    bootstrap,
    mcnemar,
    min_detectable_drop,
    paired_z,
    unpaired_z,
)
from evaluation.metrics import MACRO, MICRO, Groups, Outcome, Score, summarize_outcomes
from evaluation.statistics.adjusted import holm

AVERAGES = {MICRO: "micro", MACRO: "macro"}


@dataclass(frozen=True, slots=True)
class Drop:
    """What a candidate lost over some questions, under one average.

    Attributes:
        baseline: accuracy of the baseline.
        candidate: accuracy of the candidate.
        drop_pp: baseline minus candidate, percentage points.
        low_pp: lower end of its bootstrap interval.
        high_pp: upper end.
        retention: candidate / baseline; None where the baseline has nothing right.
        retention_low: lower end of its bootstrap interval.
        retention_high: upper end.
        num_samples: questions.
        num_lost: right in the baseline alone, or graded lower in the candidate.
        num_gained: right in the candidate alone, or graded higher there.
        p_value: of McNemar's exact test on these questions, two-sided (grades: of the paired t test).
        p_holm: the same, corrected for all the tests beside it; None where there are none.
    """

    baseline: Score
    candidate: Score
    drop_pp: float
    low_pp: float
    high_pp: float
    retention: float | None
    retention_low: float | None
    retention_high: float | None
    num_samples: int
    num_lost: int
    num_gained: int
    p_value: float
    p_holm: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs of one benchmark.

    Attributes:
        headline: the average that is published and judged first, ``micro`` or ``macro``.
        micro: every question weighs the same.
        macro: every subject weighs the same.
        categories: per category.
        subjects: per subject.
        unpaired_z: z of the two micro averages as if they came from different questions.
        paired_z: z of the same drop, from the flipped answers alone.
        min_detectable_pp: smallest drop of the judged average that this many questions would show, at a
            power of 80 %.
        verdict: of the judged average.
    """

    headline: str
    micro: Drop
    macro: Drop
    categories: Mapping[str, Drop]
    subjects: Mapping[str, Drop]
    unpaired_z: float | None
    paired_z: float | None
    min_detectable_pp: float
    verdict: Verdict

    @property
    def judged(self) -> Drop:
        """The drop that the verdict is about."""
        return self.micro if self.verdict.average == "micro" else self.macro


def compare_outcomes(
    baseline: Sequence[Outcome], candidate: Sequence[Outcome], groups: Groups, gate: GateSettings
) -> Comparison:
    """Compare two runs on the same questions.

    Args:
        baseline: one outcome per question, at least one.
        candidate: of the same questions in the same order.
        groups: how the benchmark averages.
        gate: tolerance, confidence and draws.
    """
    counts = count_pairs(baseline, candidate)

    def drop(names: Sequence[str], how: str, scores: tuple[Score, Score]) -> Drop:
        return _drop([counts[name] for name in names], how, scores, gate)

    def judge(names: Sequence[str], average: str, scores: tuple[Score, Score]) -> JudgedAverage:
        chosen = [counts[name] for name in names]
        strata = (Strata.micro if average == "micro" else Strata.macro)(chosen)
        pooled = Strata.micro(chosen)
        return JudgedAverage(
            unpaired_z(*scores),
            paired_z(pooled.drop, pooled.discordant_frac, pooled.num_samples),
            min_detectable_drop(strata, gate.confidence),
            judge_drop(strata, average, gate),
        )

    return compare_averages(baseline, candidate, groups, gate, list(counts), drop, judge)


@dataclass(frozen=True, slots=True)
class JudgedAverage:
    """What is found out of the averaged subjects together.

    Attributes:
        unpaired_z: see `Comparison`.
        paired_z: see `Comparison`.
        min_detectable: smallest drop of the judged average that would show, as a fraction.
        verdict: of the judged average.
    """

    unpaired_z: float | None
    paired_z: float | None
    min_detectable: float
    verdict: Verdict


def compare_averages(
    baseline: Sequence[Outcome],
    candidate: Sequence[Outcome],
    groups: Groups,
    gate: GateSettings,
    subjects: Sequence[str],
    drop: Callable[[Sequence[str], str, tuple[Score, Score]], Drop],
    judge: Callable[[Sequence[str], str, tuple[Score, Score]], JudgedAverage],
) -> Comparison:
    """Compare every average that a benchmark has, whatever the outcomes are: right and wrong, or grades.

    Args:
        baseline: one outcome per question.
        candidate: of the same questions in the same order.
        groups: how the benchmark averages.
        gate: which average is judged.
        subjects: of the questions.
        drop: subjects, average (``accuracy_micro`` or ``accuracy_macro``) and scores of both runs to what
            was lost.
        judge: the averaged subjects, the judged average (``micro`` or ``macro``) and both micro averages to
            the verdict.
    """
    before, after = summarize_outcomes(baseline, groups), summarize_outcomes(candidate, groups)
    averaged = groups.averaged(subjects)
    average = AVERAGES[groups.headline] if gate.average == HEADLINE else gate.average
    judged = judge(averaged, average, (before.micro, after.micro))
    return Comparison(
        headline=AVERAGES[groups.headline],
        micro=drop(averaged, MICRO, (before.micro, after.micro)),
        macro=drop(averaged, MACRO, (before.macro, after.macro)),
        # Two families of tests: whoever looks at four categories should not pay for 52 subjects.
        categories=corrected(
            {
                title: drop(
                    names, groups.category_average, (before.categories[title], after.categories[title])
                )
                for title, names in groups.members(subjects).items()
            }
        ),
        subjects=corrected(
            {name: drop([name], MICRO, (before.subjects[name], after.subjects[name])) for name in subjects}
        ),
        unpaired_z=judged.unpaired_z,
        paired_z=judged.paired_z,
        min_detectable_pp=100 * judged.min_detectable,
        verdict=judged.verdict,
    )


def _drop(counts: Sequence[PairCounts], how: str, scores: tuple[Score, Score], gate: GateSettings) -> Drop:
    strata = (Strata.micro if how == MICRO else Strata.macro)(counts)
    resampled = bootstrap(
        strata, confidence=gate.confidence, num_resamples=gate.num_resamples, seed=gate.seed
    )
    pooled = sum(counts, PairCounts())
    return drop_of(scores, resampled, pooled.num_samples, (pooled.lost, pooled.gained), mcnemar(pooled))


def drop_of(
    scores: tuple[Score, Score],
    resampled: Resampled,
    num_samples: int,
    changed: tuple[int, int],
    p_value: float,
) -> Drop:
    """Return what was lost between two scores, as percentage points.

    Args:
        scores: of baseline and candidate.
        resampled: intervals, as fractions.
        num_samples: questions.
        changed: questions that were lost and gained.
        p_value: two-sided, of no difference.
    """
    before, after = scores
    retention = resampled.retention
    return Drop(
        baseline=before,
        candidate=after,
        drop_pp=100 * (before.accuracy - after.accuracy),
        low_pp=100 * resampled.drop.low,
        high_pp=100 * resampled.drop.high,
        retention=after.accuracy / before.accuracy if before.accuracy else None,
        retention_low=None if retention is None else retention.low,
        retention_high=None if retention is None else retention.high,
        num_samples=num_samples,
        num_lost=changed[0],
        num_gained=changed[1],
        p_value=p_value,
    )


def corrected(drops: Mapping[str, Drop]) -> dict[str, Drop]:
    """Correct the p-values of one family of tests.

    Args:
        drops: by name.
    """
    adjusted = holm([each.p_value for each in drops.values()])
    return {
        name: dataclasses.replace(each, p_holm=p_value)
        for (name, each), p_value in zip(drops.items(), adjusted, strict=True)
    }
