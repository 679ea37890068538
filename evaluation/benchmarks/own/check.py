"""What a described benchmark comes to: some questions as they are asked, and what the rules read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evaluation.benchmarks.own.benchmark import OwnBenchmark
from evaluation.benchmarks.own.reading import ANY
from evaluation.benchmarks.tasks import make_task
from evaluation.sample import Prompt

SHOWN = 3


@dataclass(frozen=True, slots=True)
class Shown:
    """One question as it is asked.

    Attributes:
        subject: of it.
        prompt: what the model is given; of a chat every message with its role.
        key: the answer.
        read: rule → what it reads in the key itself, None: nothing.
        grades: rule → the grade of that, of rules that give one.
    """

    subject: str
    prompt: str
    key: str
    read: dict[str, str | None]
    grades: dict[str, float]


@dataclass(frozen=True, slots=True)
class OwnReport:
    """What a description comes to.

    Attributes:
        title: of the benchmark.
        splits: split → number of questions.
        subjects: subject → number of questions, of the split that is asked.
        keys: key → how often it is one; of benchmarks with options.
        shown: the first question of some subjects.
    """

    title: str
    splits: dict[str, int]
    subjects: dict[str, int]
    keys: dict[str, int]
    shown: list[Shown]


def check_own(path: Path, *, is_chat: bool = True) -> OwnReport:
    """Read a described benchmark whole, and render every prompt.

    Args:
        path: the YAML file.
        is_chat: as a chat model is asked.

    Raises:
        DataError: see `own_benchmark`; a prompt cannot be rendered.
        ConfigError: see `make_task`.
    """
    task = make_task(str(path), is_chat=is_chat)
    first: dict[str, Shown] = {}
    subjects: dict[str, int] = {}
    keys: dict[str, int] = {}
    for sample in task.samples:
        prompt = task.prompt(sample)  # every one, so that what cannot be rendered is found here
        subjects[sample.subject] = subjects.get(sample.subject, 0) + 1
        if sample.choices:
            keys[sample.answer] = keys.get(sample.answer, 0) + 1
        if sample.subject not in first:
            # A rule that does not find a key in the key alone will not find it in an answer.
            key = sample.answer.split(ANY)[0]
            read = {} if task.kind == "choices" else task.answers(sample, text=key)
            graded = {rule: task.grade(sample, found, rule) for rule, found in read.items()}
            grades = {rule: grade for rule, grade in graded.items() if grade is not None}
            shown = " | ".join(sample.answer.split(ANY))
            first[sample.subject] = Shown(sample.subject, _text(prompt), shown, read, grades)
    splits = {task.split: len(task.samples)}
    own = OwnBenchmark(path)
    for split in own.description.files:
        if split not in splits:
            splits[split] = len(own.load(path.parent, split, own.subjects(split)))
    return OwnReport(task.title, splits, subjects, dict(sorted(keys.items())), list(first.values())[:SHOWN])


def _text(prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return "\n\n".join(f"[{turn.role}]\n{turn.content}" for turn in prompt.turns)
