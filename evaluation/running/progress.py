"""How far an evaluation is: questions answered, time left, accuracy so far."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from evaluation.answer import Answer
from evaluation.running.runner import Advance, StartProgress
from evaluation.sample import Sample
from evaluation.task import Task

if TYPE_CHECKING:
    from glmtune.terminal.console import Console


@contextmanager
def progress_of(task: Task, console: Console | None) -> Generator[StartProgress]:
    """Show the progress of a task while the context is open, on standard error.

    Args:
        task: what is asked.
        console: where notes go; None shows nothing at all.

    Yields:
        What ``evaluation.running.runner.run_task`` takes as ``progress``.
    """
    if console is None:
        yield lambda done, num_new, notes: lambda sample, answer: None
        return
    from glmtune.terminal.progress import Meter

    rule = next(iter(task.rules))
    samples = {sample.key: sample for sample in task.samples}
    num_done = num_unparsed = num_failed = 0
    num_right = 0.0

    def count(sample: Sample, answer: Answer) -> None:
        nonlocal num_done, num_right, num_unparsed
        extracted = answer.extracted.get(rule)
        num_done += 1
        num_unparsed += extracted is None
        if task.labelled:
            grade = task.grade(sample, extracted, rule)
            num_right += bool(task.is_correct(sample, extracted, rule)) if grade is None else grade

    with ExitStack() as shown:

        def start(done: Sequence[Answer], num_new: int, notes: tuple[str, ...]) -> Advance:
            for note in notes:
                console.print(note, markup=False, highlight=False, soft_wrap=True)
            if done:
                console.print(f"Going on: {len(done)} of {len(task.samples)} questions are answered already.")
            for answer in done:
                count(samples[answer.key], answer)
            if not num_new:
                return lambda sample, answer: None
            measure = "mean grade" if task.is_graded(rule) else "accuracy"
            title, total = f"{task.title} {task.split}", len(done) + num_new
            meter = shown.enter_context(Meter(title, total=total, done=num_done, unit="questions"))

            def advance(sample: Sample, answer: Answer | None) -> None:
                nonlocal num_failed
                if answer is None:
                    num_failed += 1
                else:
                    count(sample, answer)
                states = (
                    f"{measure} {100 * num_right / num_done:.1f} %" if task.labelled and num_done else "",
                    f"unparsed {num_unparsed}" if num_unparsed else "",
                    f"failed {num_failed}" if num_failed else "",
                )
                tokens = (answer.num_new_tokens or 0) if answer is not None else 0
                meter.update(num_done + num_failed, tokens=tokens, state="  ".join(filter(None, states)))

            return advance

        yield start
