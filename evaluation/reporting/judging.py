"""From answers to judgements: right, wrong or not understood, under every rule that can be applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evaluation.answer import TOO_LONG, Answer
from evaluation.metrics import Outcome
from evaluation.sample import Sample
from evaluation.task import Task
from glmtune.errors import DataError


@dataclass(frozen=True, slots=True)
class Judgement:
    """How one question went, under every rule that could be applied.

    Attributes:
        sample: the question.
        answer: what the model gave.
        extracted: answer under each rule that could be applied; None where it found nothing.
        is_correct: whether that answer is right, by rule.
        undecided: rules that could not find out whether it is right: unknown, and counted as wrong.
        scores: its grade from 0 to 1 under the rules that give one.
        weights: of the question in the averages, under the rules that weigh.
    """

    sample: Sample
    answer: Answer
    extracted: Mapping[str, str | None]
    is_correct: Mapping[str, bool]
    scores: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    undecided: frozenset[str] = frozenset()

    @property
    def is_truncated(self) -> bool:
        """Whether the completion was cut at its length limit."""
        return self.answer.stop_reason == "length"

    @property
    def is_too_long(self) -> bool:
        """Whether the question was not asked because no context of the model holds it."""
        return self.answer.stop_reason == TOO_LONG

    def status(self, rule: str) -> str:
        """Return ``correct``, ``wrong``, ``graded``, or ``unparsed`` (nothing was extracted)."""
        if self.extracted.get(rule) is None:
            return "unparsed"
        if rule in self.scores:
            return "graded"
        return "correct" if self.is_correct[rule] else "wrong"

    def outcome(self, rule: str) -> Outcome:
        """Return the judgement under one rule, ready to be averaged."""
        return Outcome(
            self.sample.subject,
            self.sample.index,
            is_correct=self.is_correct.get(rule, False),
            is_unparsed=self.extracted.get(rule) is None,
            is_truncated=self.is_truncated,
            score=self.scores.get(rule),
            weight=self.weights.get(rule, 1.0),
            cluster=self.sample.cluster,
        )


def judge(task: Task, answers: Sequence[Answer]) -> list[Judgement]:
    """Read every answer anew under every rule, and compare it with the gold answer.

    The journal holds what the rules read while the run was asked; a rule corrected since counts without
    asking again.

    Args:
        task: the questions and rules.
        answers: in the order of the task's samples.
    """
    judgements: list[Judgement] = []
    for sample, answer in zip(task.samples, answers, strict=True):
        extracted = task.answers(sample, text=answer.completion, scores=answer.scores)
        is_correct = _compared(task, sample, extracted)
        undecided = frozenset(rule for rule, found in is_correct.items() if found is None)
        scores = {rule: task.grade(sample, value, rule) for rule, value in extracted.items()}
        weights = {rule: weigh(sample) for rule in extracted if (weigh := task.rules[rule].weigh) is not None}
        known = {rule: score for rule, score in scores.items() if score is not None}
        right = {rule: found is True for rule, found in is_correct.items()}
        judgements.append(Judgement(sample, answer, extracted, right, known, weights, undecided))
    return judgements


def _compared(task: Task, sample: Sample, extracted: Mapping[str, str | None]) -> dict[str, bool | None]:
    """Compare what each rule read with the gold answer.

    Rules that read the same and compare alike are asked once: a comparison that comes to no end takes its
    whole time, and could come to one the second time, so that two rules would contradict each other.
    """
    outcomes: dict[object, bool | None] = {}
    found: dict[str, bool | None] = {}
    for rule, value in extracted.items():
        question = (task.rules[rule].matches, task.rules[rule].grade, value)
        if question not in outcomes:
            outcomes[question] = task.is_correct(sample, value, rule)
        found[rule] = outcomes[question]
    return found


def usable_rules(task: Task, judgements: Sequence[Judgement]) -> list[str]:
    """Return the rules that could be applied to every answer asked, the official one first.

    Saved answers may lack what a rule reads, such as choice scores.

    Args:
        task: the rules.
        judgements: of all its questions.

    Raises:
        DataError: there is none: some answers have text only, others scores only.
    """
    asked = [judgement for judgement in judgements if not judgement.is_too_long]
    rules = [rule for rule in task.rules if all(rule in judgement.extracted for judgement in asked)]
    if not rules:
        raise DataError(
            f"no rule of {task.protocol} ({', '.join(task.rules)}) can be applied to all {len(asked)}"
            " answers: some have only `completion`, others only `choice_logprobs`. Give all the same fields."
        )
    return rules
