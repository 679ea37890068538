"""Accuracies with standard errors: per subject, per category, and the averages that publications print.

Publications average in different ways and seldom say how; between them lie up to four points (BBH, direct
answers). So both are computed always, and each benchmark says which one its published figures fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MICRO = "accuracy_micro"
MACRO = "accuracy_macro"
OWN_SUBJECTS = "own subjects"
"""Average of a user's own subjects beside the official ones."""
Z_95 = 1.959964
"""Standard errors on each side of a normal mean that hold 95 % of it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one question went under one extraction rule.

    Attributes:
        subject: of the sample.
        index: of the sample in its official file, from 0.
        is_correct: whether the extracted answer is right.
        is_unparsed: whether nothing could be extracted; such an outcome is never correct.
        is_truncated: whether the completion was cut at its length limit.
        score: from 0 to 1 where answers are graded (an overlap with a reference) or a question has several;
            None: right or wrong.
        weight: of the question in averages, such as how many instructions it has.
        cluster: what it shares with other questions beside the subject; empty where nothing is named.
    """

    subject: str
    index: int
    is_correct: bool
    is_unparsed: bool = False
    is_truncated: bool = False
    score: float | None = None
    weight: float = 1.0
    cluster: str = ""

    @property
    def value(self) -> float:
        """What it adds to an average: its score, else 1 for right and 0 for wrong."""
        return float(self.is_correct) if self.score is None else self.score


@dataclass(frozen=True, slots=True)
class Score:
    """An accuracy, or the mean of grades, over some questions.

    Attributes:
        accuracy: from 0 to 1.
        num_samples: questions in it.
        stderr: standard error of the accuracy; None where one question alone tells nothing.
        num_unparsed: answers that could not be extracted.
        num_truncated: completions cut at their length limit.
    """

    accuracy: float
    num_samples: int
    stderr: float | None
    num_unparsed: int = 0
    num_truncated: int = 0


@dataclass(frozen=True, slots=True)
class Groups:
    """How a benchmark's subjects form its averages.

    Attributes:
        headline: the average it publishes, ``accuracy_micro`` or ``accuracy_macro``.
        categories: subject to category; empty where there are none.
        category_average: how the subjects of a category are averaged.
        further: further named averages over subjects, each a list of units of equal weight; the subjects of
            one unit are averaged first.
        further_micro: further named averages in which every question of the subjects weighs the same.
        official: subjects that the published averages are of; empty where all are. Others stand apart, in an
            average of their own, unless there is nothing else.
    """

    headline: str = MICRO
    categories: Mapping[str, str] = field(default_factory=dict)
    category_average: str = MICRO
    further: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    further_micro: Mapping[str, Sequence[str]] = field(default_factory=dict)
    official: frozenset[str] = frozenset()

    def averaged(self, subjects: Iterable[str]) -> list[str]:
        """Return those of some subjects that the averages are of, in their order."""
        there = list(subjects)
        return [name for name in there if name in self.official] or there

    def members(self, subjects: Iterable[str]) -> dict[str, list[str]]:
        """Return category to those of some subjects that are in it, both in the subjects' order."""
        found: dict[str, list[str]] = {}
        for name in subjects:
            if name in self.categories:
                found.setdefault(self.categories[name], []).append(name)
        return found


@dataclass(frozen=True, slots=True)
class Summary:
    """All averages of one run under one extraction rule.

    Attributes:
        headline: which of the two averages the benchmark publishes.
        micro: every question weighs the same.
        macro: mean over the subjects.
        subjects: score per subject, in the order of the samples.
        categories: score per category.
        further: other averages of this benchmark by name (``accuracy_macro_23``, ``hard``, ...); one whose
            subjects are not all there is left out.
    """

    headline: str
    micro: Score
    macro: Score
    subjects: Mapping[str, Score]
    categories: Mapping[str, Score]
    further: Mapping[str, Score]

    @property
    def stderr(self) -> float | None:
        """Standard error of the headline average."""
        return self.micro.stderr if self.headline == MICRO else self.macro.stderr

    @property
    def accuracy(self) -> float:
        """The headline average."""
        return self.micro.accuracy if self.headline == MICRO else self.macro.accuracy


def binomial_stderr(accuracy: float, num_samples: int) -> float | None:
    """Return the standard error of an accuracy, ``sqrt(p (1 - p) / (n - 1))``; None below two samples.

    >>> round(binomial_stderr(721 / 1346, 1346), 4)
    0.0136
    """
    if num_samples < 2:
        return None
    return math.sqrt(accuracy * (1 - accuracy) / (num_samples - 1))


def summarize_outcomes(outcomes: Sequence[Outcome], groups: Groups) -> Summary:
    """Average outcomes in every way the benchmark is reported.

    Args:
        outcomes: one per question; at least one.
        groups: of the benchmark (``evaluation.benchmarks``).

    Returns:
        The averages; the order of the outcomes inside a subject does not matter.
    """
    assert outcomes, "no outcomes to average"
    by_subject: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_subject.setdefault(outcome.subject, []).append(outcome)
    subjects = {name: micro_score(rows) for name, rows in by_subject.items()}

    def average(names: Sequence[str], how: str) -> Score:
        if how == MACRO:
            return macro_score([[subjects[name]] for name in names])
        return micro_score([row for name in names for row in by_subject[name]])

    averaged = groups.averaged(subjects)
    own = [name for name in subjects if name not in averaged]
    further = {
        title: macro_score([[subjects[name] for name in unit] for unit in units])
        for title, units in groups.further.items()
        if all(name in subjects for unit in units for name in unit)
    }
    further |= {
        title: average(names, MICRO)
        for title, names in groups.further_micro.items()
        if all(name in subjects for name in names)
    }
    if own:
        further[OWN_SUBJECTS] = average(own, groups.headline)
    return Summary(
        headline=groups.headline,
        micro=average(averaged, MICRO),
        macro=average(averaged, MACRO),
        subjects=subjects,
        categories={
            title: average(names, groups.category_average)
            for title, names in groups.members(subjects).items()
        },
        further=further,
    )


def graded_stderr(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return the standard error of a weighted mean of grades; None below two of them.

    That of a ratio of two sums, ``sqrt(n / (n - 1) sum((w (x - mean))^2)) / sum(w)``; with equal weights it
    is the usual one, and for grades of 0 and 1 that of `binomial_stderr`.

    >>> round(graded_stderr([1.0, 0.0, 0.5, 0.5], [1.0] * 4), 4)
    0.2041

    Source:
        Cochran 1977, "Sampling Techniques", equation 2.46; of equal weights Miller 2024, "Adding error bars
        to evals", arXiv:2411.00640, equation 1.
    """
    count = len(values)
    if count < 2:
        return None
    total = math.fsum(weights)
    mean = math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / total
    squares = math.fsum((weight * (value - mean)) ** 2 for weight, value in zip(weights, values, strict=True))
    return math.sqrt(count / (count - 1) * squares) / total


def micro_score(outcomes: Sequence[Outcome]) -> Score:
    """Average outcomes, every question by its weight: the same for all, unless a rule weighs."""
    count = len(outcomes)
    if all(outcome.score is None and outcome.weight == 1 for outcome in outcomes):
        accuracy = sum(outcome.is_correct for outcome in outcomes) / count
        stderr = binomial_stderr(accuracy, count)
    else:
        values, weights = [each.value for each in outcomes], [each.weight for each in outcomes]
        pairs = zip(weights, values, strict=True)
        accuracy = math.fsum(weight * value for weight, value in pairs) / math.fsum(weights)
        stderr = graded_stderr(values, weights)
    return Score(
        accuracy=accuracy,
        num_samples=count,
        stderr=stderr,
        num_unparsed=sum(outcome.is_unparsed for outcome in outcomes),
        num_truncated=sum(outcome.is_truncated for outcome in outcomes),
    )


def macro_score(units: Sequence[Sequence[Score]]) -> Score:
    """Average units of equal weight, each the plain mean of its scores.

    The standard error is that of a weighted sum of independent accuracies, ``sqrt(sum((w se)^2))``; with one
    score per unit it is ``(1/S) sqrt(sum(se^2))``.
    """
    total, variance, is_known = 0.0, 0.0, True
    for unit in units:
        weight = 1 / (len(units) * len(unit))
        for score in unit:
            total += weight * score.accuracy
            is_known = is_known and score.stderr is not None
            variance += (weight * (score.stderr or 0.0)) ** 2
    scores = [score for unit in units for score in unit]
    return Score(
        accuracy=total,
        num_samples=sum(score.num_samples for score in scores),
        stderr=math.sqrt(variance) if is_known else None,
        num_unparsed=sum(score.num_unparsed for score in scores),
        num_truncated=sum(score.num_truncated for score in scores),
    )


def interval(score: Score) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy: Wilson's, which stays honest near 0 and 1.

    For averages of averages the number of questions is replaced by the number that would give their standard
    error.

    >>> [round(end, 3) for end in interval(Score(0.0, 60, 0.0))]
    [0.0, 0.06]

    Args:
        score: an accuracy; one without a standard error says nothing: 0 to 1.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if score.stderr is None:
        return 0.0, 1.0
    spread = score.accuracy * (1 - score.accuracy)
    # From stderr = sqrt(p (1 - p) / (n - 1)), solved for n.
    count = spread / score.stderr**2 + 1 if score.stderr > 0 else score.num_samples
    center = (score.accuracy + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half = Z_95 / (1 + Z_95**2 / count) * math.sqrt(spread / count + (Z_95 / (2 * count)) ** 2)
    low, high = max(0.0, center - half), min(1.0, center + half)
    return min(low, score.accuracy), max(high, score.accuracy)  # rounding must not put it outside
