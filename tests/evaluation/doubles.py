"""A small task and a model that answers from a table, for tests of what surrounds both."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.answer import Answer
from evaluation.backend import Limits, ModelIdentity
from evaluation.metrics import Groups
from evaluation.running.data_parallel import Processes
from evaluation.running.runner import Finished, run_task
from evaluation.sample import ChoiceScores, Completion, Prompt, Sample
from evaluation.task import SCORES, PreparedProtocol, Rule, Task
from glmtune.messages import Message

IDENTITY = ModelIdentity("table", "w0", "chatglm2", "float32", "none", "none", True, "glmtune")


def make_samples(sizes: dict[str, int]) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            "quiz", subject, index, f"{subject} question {index}?", ("1", "2", "3", "4"), "ABCD"[index % 4]
        )
        for subject, size in sizes.items()
        for index in range(size)
    )


def write(sample: Sample, num_fewshot: int) -> Prompt:
    shots = "".join(f"Q: exemplar {number}\nA: C\n" for number in range(num_fewshot))
    return Prompt(text=f"{shots}Q: {sample.question}\nA:", num_fewshot=num_fewshot)


def write_extraction(sample: Sample, completion: str) -> Prompt:
    return Prompt(turns=(Message("user", f"{sample.question}{completion}\nThe answer is"),))


def last_letter(text: str, sample: Sample) -> str | None:
    return next((letter for letter in reversed(text) if letter in "ABCD"), None)


def first_letter(text: str, sample: Sample) -> str | None:
    return next((letter for letter in text if letter in "ABCD"), None)


def make_task(
    kind: str = "generate", *, sizes: dict[str, int] | None = None, num_fewshot: int = 0, **changes: Any
) -> Task:
    """A task of a made-up benchmark `quiz`; gold answers go A, B, C, D."""
    text_rules = {"official": Rule("last letter", last_letter), "strict": Rule("first letter", first_letter)}
    letters = Rule("best choice", lambda letter, sample: letter, reads=SCORES)
    prepared = PreparedProtocol(
        kind=kind,
        rules=text_rules
        if kind == "generate"
        else {"choice": letters}
        if kind == "choices"
        else {"choice": letters, **text_rules},
        write=write,
        limits=Limits(16, ("\nQ:",)),
        choices=() if kind == "generate" else (" A", " B", " C", " D"),
        write_extraction=write_extraction if kind == "generate_then_choices" else None,
        num_fewshot=num_fewshot,
    )
    values: dict[str, Any] = {
        "benchmark": "quiz",
        "title": "Quiz",
        "protocol": "test",
        "split": "val",
        "samples": make_samples(sizes or {"law": 5, "art": 7}),
        "prepared": prepared,
        "licence": "own",
        "source": "here",
        "groups": Groups(categories={"law": "Hard", "art": "Soft"}),
    }
    return Task(**{**values, **changes})


class Stopped(Exception):
    """Thrown by a backend that is told to fail after some answers."""


class TableBackend:
    """Answers right or wrong by the length of the question; results come in an order of its own."""

    def __init__(
        self, *, context: int = 10_000, fail_after: int | None = None, reverse: bool = False
    ) -> None:
        self.identity = IDENTITY
        self.max_context_tokens = context
        self.fail_after = fail_after
        self.reverse = reverse
        self.asked: list[str] = []
        self.calls: list[tuple[str, int, Limits | None]] = []

    def count_tokens(self, prompt: Prompt) -> int:
        return sum(map(len, [prompt.text or "", *(turn.content for turn in prompt.turns)]))

    def _order(self, prompts: Sequence[Prompt]) -> Iterator[int]:
        places = range(len(prompts))
        for place in reversed(places) if self.reverse else places:
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise Stopped
            prompt = prompts[place]
            self.asked.append(prompt.text if prompt.text is not None else prompt.turns[-1].content)
            yield place

    def generate(self, prompts: Sequence[Prompt], limits: Limits) -> Iterator[tuple[int, Completion]]:
        self.calls.append(("generate", len(prompts), limits))
        for place in self._order(prompts):
            text = prompts[place].text or prompts[place].turns[-1].content
            number = int(text.rpartition("question ")[2].partition("?")[0])
            kinds = [("it is B or A", "eos"), ("B", "eos"), ("no idea", "length"), ("C, no: D", "stop")]
            answer, reason = kinds[number % 4]
            yield place, Completion(answer, reason, self.count_tokens(prompts[place]), len(answer))

    def score_choices(
        self, prompts: Sequence[Prompt], choices: Sequence[str]
    ) -> Iterator[tuple[int, ChoiceScores]]:
        self.calls.append(("score", len(prompts), None))
        for place in self._order(prompts):
            text = prompts[place].text or prompts[place].turns[-1].content
            number = int(text.rpartition("question ")[2].partition("?")[0])
            best = number % 3
            logprobs = tuple(-0.5 if choice == best else -2.0 - choice for choice in range(len(choices)))
            yield place, ChoiceScores(logprobs, self.count_tokens(prompts[place]))


def other_model(**changes: Any) -> TableBackend:
    backend = TableBackend()
    backend.identity = dataclasses.replace(IDENTITY, **changes)
    return backend


def run_ranks(
    folder: Path, world_size: int, task: Task | None = None, *, wait_seconds: float = 20, **backends
):
    """Run a task in several threads as if they were processes; returns results and errors by rank."""
    results, errors = {}, {}

    def work(rank: int) -> None:
        try:
            backend = backends.get(f"rank{rank}") or TableBackend()
            processes = Processes(rank, world_size, wait_seconds)
            results[rank] = (run_task(task or make_task(), backend, folder, processes=processes), backend)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results, errors


def timeless(finished: Finished) -> list[Answer]:
    """The answers without what depends on the clock."""
    return [dataclasses.replace(answer, seconds=0.0) for answer in finished.answers]
