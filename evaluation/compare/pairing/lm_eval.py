"""Samples of lm-evaluation-harness as runs: ``samples_TASK_DATE.jsonl``, which ``--log_samples`` writes.

A line is a question under one filter; the layout is that of 0.4 (read with 0.4.13)::

    {"doc_id": 7, "doc": {"question": ..., "choices": [...]}, "target": "2", "filter": "none",
     "resps": [...], "filtered_resps": [...], "metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0,
     "doc_hash": ..., "prompt_hash": ..., "target_hash": ...}

The harness has scored each question; that score is taken, nothing is read anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
    "mmlu_": "mmlu", "ceval-valid_": "ceval", "cmmlu_": "cmmlu", "bbh_zeroshot_": "bbh",
    "bbh_fewshot_": "bbh", "bbh_cot_zeroshot_": "bbh", "bbh_cot_fewshot_": "bbh", "gsm8k_cot": "gsm8k",
}  # fmt: skip
"""Beginnings of tasks that are parts (or ways to ask) of one benchmark: its subjects are several files."""


class _Line(Record):
    """What is read of a line; metrics are fields of their own names."""

    doc_id: Annotated[int, Field(ge=0, le=MAX_COUNT, description="a whole number from 0")]
    doc: Annotated[dict[str, Any], Field(description="the question as an object")]
    filter: Text = "none"
    metrics: Annotated[list[str], Field(min_length=1, description="names of metrics")]


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
        metric: which score counts; None takes the first that a task names.
        filter: which of the harness's filters; None takes the first of a file.

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
    benchmarks: dict[str, list[str]] = {}
    for task in by_task:
        benchmarks.setdefault(_benchmark(task), []).append(task)
    return {
        name: _run(name, path, {task: by_task[task] for task in tasks}, metric, filter)
        for name, tasks in benchmarks.items()
    }


def _benchmark(task: str) -> str:
    return next((name for start, name in FAMILIES.items() if task.startswith(start)), task)


def _run(
    benchmark: str, path: Path, files: Mapping[str, Path], metric: str | None, filter: str | None
) -> ScoredRun:
    rows: list[tuple[Outcome, QuestionText]] = []
    taken: set[str] = set()
    for task, file in files.items():
        name, found = _read(task, file, metric, filter)
        taken.add(name)
        rows += found
    folder = path if path.is_file() else next(iter(files.values())).parent
    return imported(benchmark, path, TOOL, folder.stem, ", ".join(sorted(taken)), rows)


def _read(
    task: str, file: Path, metric: str | None, filter: str | None
) -> tuple[str, list[tuple[Outcome, QuestionText]]]:
    """Read one file: the metric with its filter in words, and the questions."""
    lines = _lines(file)
    filters = list(dict.fromkeys(line.filter for line, _, _ in lines))
    chosen = filters[0] if filter is None else filter
    if chosen not in filters:
        raise DataError(
            f"`imported.filter` is `{chosen}`, but this file has {', '.join(filters)}. Name one of these.",
            path=file,
        )
    rows: list[tuple[Outcome, QuestionText]] = []
    seen: dict[int, int] = {}
    measured = ""
    for line, values, number in lines:
        if line.filter != chosen:
            continue
        measured = line.metrics[0] if metric is None else metric
        if measured not in line.metrics:
            raise DataError(
                f"`imported.metric` is `{measured}`, but this task has {', '.join(line.metrics)}. Name one of"
                " these.",
                path=file,
                line=number,
            )
        if line.doc_id in seen:
            raise DataError(
                f"`doc_id` {line.doc_id} is there a second time (first in line {seen[line.doc_id]}), and"
                " pairs need every question once. Keep one of the lines.",
                path=file,
                line=number,
            )
        seen[line.doc_id] = number
        score = _score(values.get(measured), measured, file, number)
        rows.append((outcome_of(task, line.doc_id, score), _text(line.doc, file, number)))
    return measured if chosen == "none" else f"{measured}, {chosen}", rows


def _lines(file: Path) -> list[tuple[_Line, dict[str, Any], int]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror or error}).", path=file) from None
    found: list[tuple[_Line, dict[str, Any], int]] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            values = json.loads(raw)
            if not isinstance(values, dict):
                raise ValueError("an object was expected")
            found.append((validated(_Line, values), values, number))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"it is no sample of {TOOL}: {error}. Write them with `--log_samples`.",
                path=file,
                line=number,
            ) from None
    if not found:
        raise DataError(f"it holds no samples. Write them with `--log_samples` of {TOOL}.", path=file)
    return found


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
