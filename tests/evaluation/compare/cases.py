"""Made-up pairs of runs: outcomes with a known drop, and run folders as `glmtune eval` leaves them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.answer import Answer
from evaluation.compare.settings import ImportSettings
from evaluation.compare.several import Matrix, compare_each, read_sides
from evaluation.compare.statistics.counts import PairCounts
from evaluation.metrics import Outcome
from evaluation.reporting.files import write_report
from evaluation.reporting.results import make_result
from evaluation.running.fingerprint import fingerprint
from evaluation.task import Task
from tests.evaluation.doubles import IDENTITY, make_task

INT4 = dataclasses.replace(IDENTITY, weights_hash="w4", quantization="int4")


def outcomes(counts: dict[str, PairCounts]) -> tuple[list[Outcome], list[Outcome]]:
    """Spell counts out: one outcome per question and side."""
    before: list[Outcome] = []
    after: list[Outcome] = []
    for subject, each in counts.items():
        pairs = [(True, True)] * each.both + [(True, False)] * each.lost
        pairs += [(False, True)] * each.gained + [(False, False)] * each.neither
        for index, (was_right, is_right) in enumerate(pairs):
            before.append(Outcome(subject, index, was_right))
            after.append(Outcome(subject, index, is_right))
    return before, after


def letter_scores(letter: str, margin: float = 0.4) -> tuple[float, ...]:
    """Log-probabilities of four choices, the letter ahead."""
    import math

    rest = (0.9 - margin) / 4
    return tuple(math.log(rest + margin if each == letter else rest) for each in "ABCD")


def write_run(
    folder: Path,
    task: Task | None = None,
    identity=IDENTITY,
    *,
    wrong: Sequence[int] = (),
    answer: Callable[[int, str], Answer | None] | None = None,
    **changes: Any,
) -> Path:
    """Write a finished run whose answers are right but for the places in ``wrong``.

    ``changes`` replace top entries of the fingerprint.
    """
    task = task or make_task()
    answers = []
    for place, sample in enumerate(task.samples):
        letter = sample.answer
        if place in wrong:
            letter = "ABCD"[("ABCD".index(letter) + 1) % 4]
        made = answer(place, letter) if answer else None
        text = None if task.kind == "choices" else f"Answer: {letter}"
        scores = None if task.kind == "generate" else letter_scores(letter)
        answers.append(
            made
            or Answer(
                sample.subject,
                sample.index,
                completion=text,
                choice_logprobs=scores,
                prompt_hash=f"p{place}",
                stop_reason="eos",
            )
        )
    values = {**fingerprint(task, identity, 2048), **changes}
    write_report(make_result(task, answers, values), folder)
    (folder / "journal-rank0.jsonl").write_text(
        "".join(dataclasses.replace(each, seconds=0.5).to_line() for each in answers), encoding="utf-8"
    )
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def own_task(sizes: dict[str, int], benchmark: str = "quiz") -> Task:
    """A task of one's own, with so many questions a subject."""
    return make_task(sizes=sizes, benchmark=benchmark, file="quiz.yaml")


def compared(names: list[str], **options: Any) -> Matrix:
    """Compare every two of some runs."""
    sides = read_sides(names, ImportSettings(), None)
    chosen: dict[str, Any] = {"confidence": 0.95, "average": None, "cluster": None, **options}
    return compare_each(sides, names, **chosen)
