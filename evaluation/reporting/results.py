"""The result of a run: every average with its error, what was not understood, and its fingerprint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.answer import Answer
from evaluation.extraction.text import thinks, without_thinking
from evaluation.metrics import Outcome, Score, Summary, summarize_outcomes
from evaluation.reporting.clusters import ClusterRow, cluster_rows
from evaluation.reporting.judging import Judgement, judge, usable_rules
from evaluation.running.failed_questions import FailedQuestion
from evaluation.running.fingerprint import described
from evaluation.task import Task, hash_prompt


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that reports are made from.

    Attributes:
        task: what was asked.
        fingerprint: of the run.
        judgements: one per question, in the order of the data.
        summaries: averages under each usable rule, the deciding one first.
        failed: questions that got no answer and are not in the averages.
        num_asked: questions with those; 0 stands for those judged.
        environment: command and software of the report; empty where nobody says.
    """

    task: Task
    fingerprint: Mapping[str, Any]
    judgements: tuple[Judgement, ...]
    summaries: Mapping[str, Summary]
    failed: tuple[FailedQuestion, ...] = ()
    num_asked: int = 0
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """The rule whose accuracy is the result: the official one, where it can be applied."""
        return next(iter(self.summaries))

    @property
    def summary(self) -> Summary:
        """The averages under that rule."""
        return self.summaries[self.rule]

    @property
    def is_graded(self) -> bool:
        """Whether that rule finds answers more or less right: its averages are means of grades."""
        return self.task.is_graded(self.rule)

    @property
    def is_comparable(self) -> bool:
        """Whether published figures may stand beside this result."""
        task = self.task
        is_drawn = task.limits.drawing is not None  # what is published are the likeliest answers
        differs = task.is_sample_set or task.is_partial or task.is_own or bool(task.own_prompt) or is_drawn
        return task.labelled and not differs

    @property
    def num_shortened(self) -> int:
        """Prompts that lost exemplars, or the middle of a text, to fit the model's context."""
        return sum(
            judgement.answer.num_fewshot < self.task.num_fewshot or self._is_cut(judgement)
            for judgement in self.judgements
            if judgement.answer.prompt_hash
        )

    def _is_cut(self, judgement: Judgement) -> bool:
        if self.task.prepared.shorten is None:
            return False
        return judgement.answer.prompt_hash != hash_prompt(self.task.prompt(judgement.sample))

    @property
    def num_too_long(self) -> int:
        """Questions that no context of the model holds; they count as unparsed."""
        return sum(judgement.is_too_long for judgement in self.judgements)

    @property
    def num_undecided(self) -> int:
        """Answers of which the rule could not find out whether they are right; they count as wrong."""
        return sum(self.rule in judgement.undecided for judgement in self.judgements)

    @property
    def num_thinking(self) -> int:
        """Completions that hold thinking, which no rule reads."""
        return sum(thinks(judgement.answer.completion or "") for judgement in self.judgements)

    @property
    def num_thinking_unended(self) -> int:
        """Those of them with nothing behind the thinking: cut before the answer began."""
        return sum(
            thinks(text) and not without_thinking(text).strip()
            for judgement in self.judgements
            if (text := judgement.answer.completion)
        )

    @property
    def failure_note(self) -> str:
        """What a reader must know of the questions that failed; empty without any."""
        if not self.failed:
            return ""
        first = self.failed[0]
        return (
            f"{len(self.failed):,} of {self.num_asked:,} questions failed and are not in these figures (the"
            f" same command asks them again); the first, {first.subject} {first.index}: {first.reason}"
        )

    @property
    def drawn(self) -> str:
        """How the answers were drawn, for a title; empty where the likeliest tokens were taken."""
        drawing = self.task.limits.drawing
        return (
            "" if drawing is None else f", answer {drawing.number + 1} at temperature {drawing.temperature:g}"
        )

    @property
    def cluster_rows(self) -> list[ClusterRow]:
        """The average with its errors from clusters, one for each way to cluster the questions."""
        return cluster_rows(self.outcomes, self.task.groups)

    @property
    def outcomes(self) -> list[Outcome]:
        """How each question went under the deciding rule, in the order of the data."""
        return [each.outcome(self.rule) for each in self.judgements]

    @property
    def what(self) -> str:
        """What was measured, with SAMPLE and PARTIAL where no published figure may be compared."""
        marks = [
            mark
            for mark, holds in (
                ("OWN", self.task.is_own),
                ("SAMPLE", self.task.is_sample_set),
                ("PARTIAL", self.task.is_partial),
            )
            if holds
        ]
        return " ".join([*marks, f"{self.task.title} {self.task.split}, {self.way_asked}"])

    @property
    def way_asked(self) -> str:
        """How it was asked: the protocol, exemplars, a user's own words, and whether answers were drawn."""
        shots = f", {self.task.num_fewshot}-shot" if self.task.num_fewshot else ""
        named = "".join(f", {words}" for words in self.task.own_prompt_words)
        return f"{self.task.protocol}{shots}{named}{self.drawn}"

    @property
    def title(self) -> str:
        """What was measured, and of whom."""
        return f"{self.what}: {described(self.fingerprint['model'])}"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A finished evaluation.

    Attributes:
        result: its figures.
        folder: what was written is there.
        fingerprint: of the run as it was asked, whatever got an answer.
    """

    result: Result
    folder: Path
    fingerprint: Mapping[str, Any]


def make_result(
    task: Task,
    answers: Sequence[Answer],
    fingerprint: Mapping[str, Any],
    environment: Mapping[str, Any] | None = None,
) -> Result:
    """Judge and average the answers of a run.

    Args:
        task: what was asked.
        answers: in the order of its samples; at least one.
        fingerprint: of the run.
        environment: command and software, for readers.

    Raises:
        DataError: no rule can be applied to all answers.
    """
    judgements = judge(task, answers)
    summaries = {
        rule: summarize_outcomes([judgement.outcome(rule) for judgement in judgements], task.groups)
        for rule in usable_rules(task, judgements)
    }
    return Result(task, fingerprint, tuple(judgements), summaries, environment=environment or {})


def results_json(result: Result) -> dict[str, Any]:
    """Return the content of ``results.json``; nothing in it depends on the clock.

    Accuracies are fractions of 1; they are null where the split has no gold answers.

    Args:
        result: of the run.
    """
    task, summary = result.task, result.summary
    micro, macro = summary.micro, summary.macro
    # Without gold answers (C-Eval test) nothing is right or wrong: null, as 0 would be read as a score.
    known = task.labelled
    values: dict[str, Any] = {
        "title": result.title,
        "model": described(result.fingerprint["model"]),
        "benchmark": task.benchmark,
        "protocol": task.protocol,
        "split": task.split,
        "num_fewshot": task.num_fewshot,
        "num_samples": micro.num_samples,
        "own_subjects": list(task.own_subjects),
        "is_sample_set": task.is_sample_set,
        "is_partial": task.is_partial,
        "headline": summary.headline,
        "accuracy_micro": micro.accuracy if known else None,
        "accuracy_macro": macro.accuracy if known else None,
    }
    if known:
        # Averages of part of the questions that publications print beside the headline, at the top level like
        # it; `further` below has them again with their errors.
        values |= {
            name: score.accuracy for name, score in summary.further.items() if name.startswith("accuracy_")
        }
    values |= {
        "stderr": summary.stderr if known else None,
        "stderr_micro": micro.stderr if known else None,
        "stderr_macro": macro.stderr if known else None,
        "num_unparsed": micro.num_unparsed,
        "num_truncated": micro.num_truncated,
        "num_shortened": result.num_shortened,
        "num_too_long": result.num_too_long,
        "num_thinking": result.num_thinking,
        "num_thinking_unended": result.num_thinking_unended,
        "num_failed": len(result.failed),
        "failed": [dataclasses.asdict(each) for each in result.failed],
        "rule": result.rule,
        "rule_version": task.rules[result.rule].version,
        "rules": {rule: _rule(result, rule) for rule in result.summaries},
        "categories": {name: _score(score, known) for name, score in summary.categories.items()},
        "further": {name: _score(score, known) for name, score in summary.further.items()},
        "subjects": {name: _score(score, known) for name, score in summary.subjects.items()},
        "fingerprint": dict(result.fingerprint),
        "environment": dict(result.environment),
    }
    if result.is_graded:
        values["is_graded"] = True
    if known and result.num_undecided:
        values["num_undecided"] = result.num_undecided
    if task.own_prompt:
        values["own_prompt"] = dict(task.own_prompt)
    if known:
        values["clustered"] = {row.by: row.to_json() for row in result.cluster_rows}
    if task.file:  # a comparison knows how only the benchmarks that ship are averaged
        groups = {"headline": task.headline, "categories": dict(task.categories)}
        values["own_benchmark"] = {"file": task.file, **groups}
    return values


def _rule(result: Result, rule: str) -> dict[str, Any]:
    summary, known = result.summaries[rule], result.task.labelled
    return {
        "about": result.task.rules[rule].about,
        "version": result.task.rules[rule].version,
        "accuracy_micro": summary.micro.accuracy if known else None,
        "accuracy_macro": summary.macro.accuracy if known else None,
        "stderr": summary.stderr if known else None,
        "num_unparsed": summary.micro.num_unparsed,
    }


def _score(score: Score, is_known: bool) -> dict[str, Any]:
    return {
        "accuracy": score.accuracy if is_known else None,
        "num_samples": score.num_samples,
        "stderr": score.stderr if is_known else None,
        "num_unparsed": score.num_unparsed,
        "num_truncated": score.num_truncated,
    }
