"""A progress bar: questions answered, time left, accuracy so far."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from evaluation.answer import Answer
from evaluation.running.runner import Advance, StartProgress
from evaluation.sample import Sample
from evaluation.task import Task

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_of(task: Task, console: Console | None) -> Generator[StartProgress]:
    """Show the progress of a task while the context is open.

    Args:
        task: what is asked.
        console: where to; None shows nothing.

    Yields:
        What ``evaluation.running.runner.run_task`` takes as ``progress``.
    """
    if console is None:
        yield lambda done, num_new, notes: lambda sample, answer: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    rule = next(iter(task.rules))
    samples = {sample.key: sample for sample in task.samples}
    num_done = num_right = num_unparsed = 0
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task(f"{task.title} {task.split}", total=None, state="")

        def count(sample: Sample, answer: Answer) -> None:
            nonlocal num_done, num_right, num_unparsed
            extracted = answer.extracted.get(rule)
            num_done += 1
            num_unparsed += extracted is None
            num_right += task.labelled and task.is_correct(sample, extracted, rule)

        def advance(sample: Sample, answer: Answer) -> None:
            count(sample, answer)
            right = f"accuracy {100 * num_right / num_done:.1f} % " if task.labelled else ""
            unparsed = f"unparsed {num_unparsed}" if num_unparsed else ""
            bar.update(shown, completed=num_done, state=f"{right}{unparsed}")

        def start(done: Sequence[Answer], num_new: int, notes: tuple[str, ...]) -> Advance:
            for note in notes:
                console.print(note, markup=False, highlight=False, soft_wrap=True)
            if done:
                console.print(f"Going on: {len(done)} of {len(task.samples)} questions are answered already.")
            for answer in done:
                count(samples[answer.key], answer)
            bar.update(shown, total=len(done) + num_new, completed=num_done)
            return advance

        yield start
