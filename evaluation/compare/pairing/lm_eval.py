"""Samples of lm-evaluation-harness as runs: ``samples_TASK_DATE.jsonl``, which ``--log_samples`` writes.

A line is a question under one filter; the layout is that of 0.4 (read with 0.4.13)::

    {"doc_id": 7, "doc": {"question": ..., "choices": [...]}, "target": "2", "filter": "none",
     "resps": [...], "filtered_resps": [...], "metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0,
     "doc_hash": ..., "prompt_hash": ..., "target_hash": ...}

The harness has scored each question; that score is taken, nothing is read anew. A line also repeats the whole
prompt and all that was answered, some hundred times what is needed of it, so files are read line by line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from evaluation.compare.pairing.scores import QuestionText, ScoredRun, imported, outcome_of
from evaluation.metrics import Outcome
from glmtune.errors import ConfigError, DataError
from glmtune.storage.records import MAX_COUNT, Record, Text, validated

TOOL = "lm-evaluation-harness"
PATTERN = "samples_*.jsonl"
_NAME = re.compile(r"samples_(?P<task>.+?)_(?P<date>\d{4}-\d{2}-\d{2}T[\d.-]+)\.jsonl")
QUESTION_FIELDS = (
    "question", "query", "problem", "input", "prompt", "goal", "ctx", "sentence", "text", "instruction",
)  # fmt: skip
"""Fields of a ``doc`` that hold the question, by the names that data sets give them; the first counts."""
FAMILIES = {
    "mmlu_pro": "mmlu_pro", "mmlu_": "mmlu", "ceval-valid_": "ceval", "cmmlu_": "cmmlu",
    "bbh_zeroshot_": "bbh", "bbh_fewshot_": "bbh", "bbh_cot_zeroshot_": "bbh", "bbh_cot_fewshot_": "bbh",
}  # fmt: skip
"""Beginnings of tasks that are subjects of one benchmark, each a file; asked in two ways they are two."""


class _Line(Record):
    """What is read of a line; metrics are fields of their own names."""

    doc_id: Annotated[int, Field(ge=0, le=MAX_COUNT, description="a whole number from 0")]
    doc: Annotated[dict[str, Any], Field(description="the question as an object")]
    filter: Text = "none"
    metrics: Annotated[list[str], Field(min_length=1, description="names of metrics")]


@dataclass(frozen=True, slots=True)
class _Sample:
    """What is kept of a line.

    Attributes:
        doc_id: number of the question.
        filter: through which its answer went.
        scores: by metric, the first one first; as written, since only the chosen one has to be a score.
        text: of the question.
        line: its number, for errors.
    """

    doc_id: int
    filter: str
    scores: Mapping[str, object]
    text: QuestionText
    line: int


def is_samples(path: Path) -> bool:
    """Say whether a file, or a folder with files (also one deeper, by model), is of the harness."""
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.match(PATTERN) else []
    return sorted([*path.glob(PATTERN), *path.glob(f"*/{PATTERN}")]) if path.is_dir() else []


def read_samples(path: Path, *, metric: str | None = None, filter: str | None = None) -> dict[str, ScoredRun]:
    """Read the samples of one model.

    Args:
        path: a file, or a folder that holds some.
        metric: which score counts where a task has several; None takes the first that it names.
        filter: which of the harness's filters counts where a file has several; None takes its first.

    Returns:
        Benchmark to its run; tasks that are subjects of one benchmark are one run.

    Raises:
        ConfigError: there are several models, or a task twice.
        DataError: a line cannot be read, or a metric or filter is not there.
    """
    files = _files(path)
    if len({file.parent for file in files}) > 1:
        names = ", ".join(sorted({file.parent.name for file in files}))
        raise ConfigError(f"`runs` names `{path}`, which holds several models ({names}). Name one of them.")
    by_task: dict[str, Path] = {}
    for file in files:
        found = _NAME.fullmatch(file.name)
        task = found["task"] if found else file.stem.removeprefix("samples_")
        if task in by_task:
            raise ConfigError(
                f"`runs` names `{path}`, which holds the task `{task}` twice ({by_task[task].name} and"
                f" {file.name}). Name one file, or move the other away."
            )
        by_task[task] = file
    lines = {task: _samples(file) for task, file in by_task.items()}
    chosen = _Chosen(metric, filter)
    chosen.check(path, lines)
    starts = {task: next((start for start in FAMILIES if task.startswith(start)), task) for task in by_task}
    families = [FAMILIES.get(start, start) for start in dict.fromkeys(starts.values())]
    benchmarks: dict[str, list[str]] = {}
    for task, start in starts.items():
        family = FAMILIES.get(start, start)
        name = family if families.count(family) == 1 else start.rstrip("_")
        benchmarks.setdefault(name, []).append(task)
    return {
        name: _run(name, path, {task: (by_task[task], lines[task]) for task in tasks}, chosen)
        for name, tasks in benchmarks.items()
    }


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What was asked for; it counts for the tasks that have a choice."""

    metric: str | None
    filter: str | None

    def check(self, path: Path, lines: Mapping[str, Sequence[_Sample]]) -> None:
        """Refuse what no task has."""
        every = [line for several in lines.values() for line in several]
        known = {
            "filter": list(dict.fromkeys(line.filter for line in every)),
            "metric": list(dict.fromkeys(name for line in every for name in line.scores)),
        }
        for name, given in (("filter", self.filter), ("metric", self.metric)):
            if given is not None and given not in known[name]:
                raise DataError(
                    f"`imported.{name}` is `{given}`, but there are {', '.join(known[name])}. Name one of"
                    " these.",
                    path=path,
                )


def _run(
    benchmark: str, path: Path, tasks: Mapping[str, tuple[Path, Sequence[_Sample]]], chosen: _Chosen
) -> ScoredRun:
    rows: list[tuple[Outcome, QuestionText]] = []
    taken: dict[str, None] = {}
    for task, (file, lines) in tasks.items():
        name, found = _scores(task, file, lines, chosen)
        taken[name] = None
        rows += found
    folder = next(iter(tasks.values()))[0].parent
    return imported(benchmark, path, TOOL, folder.name, ", ".join(taken), rows)


def _scores(
    task: str, file: Path, lines: Sequence[_Sample], chosen: _Chosen
) -> tuple[str, list[tuple[Outcome, QuestionText]]]:
    """Return the metric of a file with its filter in words, and the questions."""
    filters = list(dict.fromkeys(line.filter for line in lines))
    filter = chosen.filter if chosen.filter in filters else filters[0]
    rows: list[tuple[Outcome, QuestionText]] = []
    seen: dict[int, int] = {}
    measured = ""
    for line in lines:
        if line.filter != filter:
            continue
        first = next(iter(line.scores))
        measured = chosen.metric if chosen.metric is not None and chosen.metric in line.scores else first
        if line.doc_id in seen:
            raise DataError(
                f"`doc_id` {line.doc_id} is there a second time (first in line {seen[line.doc_id]}), and"
                " pairs need every question once. Keep one of the lines.",
                path=file,
                line=line.line,
            )
        seen[line.doc_id] = line.line
        score = _score(line.scores[measured], measured, file, line.line)
        rows.append((outcome_of(task, line.doc_id, score), line.text))
    return measured if filter == "none" else f"{measured}, {filter}", rows


def _samples(file: Path) -> list[_Sample]:
    found: list[_Sample] = []
    # A question stands in as many lines as there are filters; its text is kept once.
    texts: dict[QuestionText, QuestionText] = {}
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                if raw.strip():
                    found.append(_sample(raw, file, number, texts))
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror or error}).", path=file) from None
    if not found:
        raise DataError(f"it holds no samples. Write them with `--log_samples` of {TOOL}.", path=file)
    return found


def _sample(raw: bytes, file: Path, number: int, texts: dict[QuestionText, QuestionText]) -> _Sample:
    try:
        values = json.loads(raw)
        if not isinstance(values, dict):
            raise ValueError("an object was expected")
        line = validated(_Line, values)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"it is no sample of {TOOL}: {error}. Write them with `--log_samples`.", path=file, line=number
        ) from None
    text = _text(line.doc, file, number)
    scores = {name: values.get(name) for name in line.metrics}
    return _Sample(line.doc_id, line.filter, scores, texts.setdefault(text, text), number)


def _score(value: object, metric: str, file: Path, number: int) -> float:
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value)
    raise DataError(
        f"`{metric}` is {str(value)[:40]!r}, but a score of a question must be a number from 0 to 1. Name"
        " another with `imported.metric`.",
        path=file,
        line=number,
    )


def _text(doc: Mapping[str, Any], file: Path, number: int) -> QuestionText:
    text = next((doc[name] for name in QUESTION_FIELDS if isinstance(doc.get(name), str)), None)
    if text is None:
        raise DataError(
            f"`doc` has the fields {', '.join(doc)[:80]}, none of which is known to hold the question"
            f" ({', '.join(QUESTION_FIELDS)}). Rename one of them.",
            path=file,
            line=number,
        )
    return QuestionText(text, _choices(doc))


def _choices(doc: Mapping[str, Any]) -> tuple[str, ...]:
    given = doc.get("choices")
    if isinstance(given, dict):
        given = given.get("text")
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(str(each) for each in given)
    letters = [doc.get(letter) for letter in "ABCD"]
    return tuple(map(str, letters)) if all(isinstance(each, str) for each in letters) else ()
