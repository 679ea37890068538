"""From the results of K answers to each question to one result, in which the question is the unit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.metrics import Groups, Outcome, Summary, summarize_outcomes
from evaluation.reporting.judging import Judgement
from evaluation.reporting.results import Result, results_json
from evaluation.running.failed_questions import FailedQuestion
from evaluation.statistics.sampled import Draws, drawing_variance, steps_of_k
from glmtune.errors import GlmtuneError

MEAN, MAJORITY, FIRST = "mean", "majority", "pass@1"


@dataclass(frozen=True, slots=True)
class SampledResult(Result):
    """Everything that the reports of a sampled run are made from; its accuracy is the mean over answers.

    Attributes:
        draws: the answers to each question, in the order of the task's samples.
        estimates: averages of the mean, of the majority vote and of pass@k, by name; pass@1 is the mean, and
            stands by itself only where answers are graded: then only full marks pass.
        num_answers: to each question.
        num_unparsed_answers: of all answers, those in which nothing was found.
        num_truncated_answers: of all answers, those cut at their length limit.
        num_undecided_answers: of all answers, those that the rule could not compare (see `num_undecided`).
        are_truncated: of each question, whether every answer was cut; such questions count as truncated.
    """

    draws: tuple[Draws, ...] = ()
    estimates: Mapping[str, Summary] = field(default_factory=dict)
    num_answers: int = 0
    num_unparsed_answers: int = 0
    num_truncated_answers: int = 0
    num_undecided_answers: int = 0
    are_truncated: tuple[bool, ...] = ()

    @property
    def is_comparable(self) -> bool:
        """Never: published figures are of one greedy answer."""
        return False

    @property
    def drawn(self) -> str:
        """How the answers were drawn, for a title."""
        drawing = self.task.limits.drawing
        assert drawing is not None, "a sampled run draws"
        many = "1 answer" if self.num_answers == 1 else f"{self.num_answers} answers"
        return f", {many} at temperature {drawing.temperature:g}"

    @property
    def num_undecided(self) -> int:
        """Of all answers, not of the first ones that stand for the questions in ``judgements``."""
        return self.num_undecided_answers

    @property
    def outcomes(self) -> list[Outcome]:
        """The share of its answers that is right, of each question in the order of the data."""
        return _outcomes(self, [each.mean for each in self.draws])

    @property
    def drawing_frac(self) -> float | None:
        """Share of the variance of the micro average that comes from the drawing; None where unknown."""
        stderr, part = self.estimates[MEAN].micro.stderr, drawing_variance(self.draws)
        return None if not stderr or part is None else min(1.0, part / stderr**2)


def put_together(results: Sequence[Result], fingerprint: Mapping[str, Any]) -> SampledResult:
    """Put the results of K answers to the same questions together.

    Args:
        results: one per answer, in their order.
        fingerprint: of all answers together.

    Returns:
        The result over the questions that have all K answers; one that failed once is left out and named.

    Raises:
        GlmtuneError: no question has all answers.
    """
    first = results[0]
    by_key = [{each.sample.key: each for each in result.judgements} for result in results]
    kept = [each for each in first.judgements if all(each.sample.key in found for found in by_key)]
    failed: dict[tuple[str, int], FailedQuestion] = {}
    for result in results:
        for each in result.failed:
            failed.setdefault(each.key, each)
    if not kept:
        raise GlmtuneError(
            f"No question of {first.task.title} has all {len(results)} answers; the same command asks those"
            " that failed again."
        )
    task = dataclasses.replace(first.task, samples=tuple(each.sample for each in kept))
    if failed:
        task = dataclasses.replace(task, is_partial=True)
    rows = [[found[each.sample.key] for found in by_key] for each in kept]
    draws = tuple(_draws(row, first.rule) for row in rows)
    judgements = tuple(kept)  # of the first answers: what all answers share (prompt, exemplars) is read there
    answers = [judgement for row in rows for judgement in row]
    made = SampledResult(
        task=task,
        fingerprint=fingerprint,
        judgements=judgements,
        summaries={},
        failed=tuple(failed.values()),
        num_asked=max(result.num_asked for result in results) or len(judgements),
        environment=first.environment,
        draws=draws,
        num_answers=len(results),
        num_unparsed_answers=sum(each.extracted.get(first.rule) is None for each in answers),
        num_truncated_answers=sum(each.is_truncated for each in answers),
        num_undecided_answers=sum(first.rule in each.undecided for each in answers),
        are_truncated=tuple(all(each.is_truncated for each in row) for row in rows),
    )
    estimates = _estimates(made, task.groups, is_graded=task.is_graded(first.rule))
    return dataclasses.replace(made, summaries={first.rule: estimates[MEAN]}, estimates=estimates)


def _draws(judgements: Sequence[Judgement], rule: str) -> Draws:
    return Draws(
        tuple(each.extracted.get(rule) for each in judgements),
        tuple(each.outcome(rule).value for each in judgements),
    )


def _estimates(result: SampledResult, groups: Groups, *, is_graded: bool) -> dict[str, Summary]:
    scores = {
        MEAN: [each.mean for each in result.draws],
        MAJORITY: [each.majority for each in result.draws],
        **({FIRST: [each.pass_at(1) for each in result.draws]} if is_graded else {}),
        **{f"pass@{k}": [each.pass_at(k) for each in result.draws] for k in steps_of_k(result.num_answers)},
    }
    return {name: summarize_outcomes(_outcomes(result, each), groups) for name, each in scores.items()}


def _outcomes(result: SampledResult, scores: Sequence[float]) -> list[Outcome]:
    return [
        Outcome(
            sample.subject,
            sample.index,
            is_correct=math.isclose(score, 1.0),
            is_unparsed=draws.voted is None,
            is_truncated=is_truncated,
            score=score,
            cluster=sample.cluster,
        )
        for sample, draws, is_truncated, score in zip(
            result.task.samples, result.draws, result.are_truncated, scores, strict=True
        )
    ]


def sampled_json(result: SampledResult) -> dict[str, Any]:
    """Return the content of ``results.json``: that of any evaluation, and what several answers add.

    Args:
        result: of the run.
    """
    drawing = result.task.limits.drawing
    assert drawing is not None, "a sampled run draws"
    values = results_json(result)
    return {
        **values,
        "num_answers": result.num_answers,
        "num_unparsed_answers": result.num_unparsed_answers,
        "num_truncated_answers": result.num_truncated_answers,
        "sampling": {
            "temperature": drawing.temperature,
            "top_p": drawing.top_p,
            "top_k": drawing.top_k,
            "seed": drawing.seed,
        },
        "estimates": {
            name: {
                "accuracy_micro": summary.micro.accuracy,
                "stderr_micro": summary.micro.stderr,
                "accuracy_macro": summary.macro.accuracy,
                "stderr_macro": summary.macro.stderr,
            }
            for name, summary in result.estimates.items()
        },
        "drawing_frac_of_variance": result.drawing_frac,
    }
