"""Runs of OpenCompass: ``predictions/MODEL/SET.json`` and ``results/MODEL/SET.json``.

The first has prompts and answers, the second the scores; single questions are in it where the evaluation was
told ``--dump-eval-details``::

    predictions/m/gsm8k.json   {"0": {"origin_prompt": [{"role": "HUMAN", "prompt": ...}], "prediction": ...}}
    results/m/gsm8k.json       {"accuracy": 50.0, "details": {"type": "GEN", "0": {"correct": true, ...}}}

Each file is one JSON object, which cannot be read in parts; one data set is held at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.compare.pairing.scores import (
    OF_PROMPTS,
    QuestionText,
    ScoredRun,
    imported,
    outcome_of,
)
from evaluation.metrics import Outcome
from glmtune.errors import ConfigError, DataError

TOOL = OF_PROMPTS
RESULTS, PREDICTIONS = "results", "predictions"
FAMILIES = {
    "lukaemon_mmlu_": "mmlu",
    "ceval-": "ceval",
    "cmmlu-": "cmmlu",
    "bbh-": "bbh",
    "agieval-": "agieval",
}
"""Beginnings of data sets that are subjects of one benchmark."""
AGAIN = "Evaluate again with `--dump-eval-details`, which writes the score of every question."
_PLACE = re.compile("0|[1-9][0-9]{0,8}")
"""Number of a question, written in one way only."""
ROUNDING = 0.01
"""Percentage points by which a written accuracy may differ from its questions: it is rounded."""


def is_work_folder(path: Path) -> bool:
    """Say whether a folder is a run of OpenCompass: with results of models, or the results of one."""
    return bool(_models(path))


def _models(path: Path) -> list[Path]:
    """Return the folders with results of a model."""
    if not path.is_dir():
        return []
    if path.parent.name == RESULTS and any(path.glob("*.json")):
        return [path]
    return sorted(each for each in path.glob(f"{RESULTS}/*") if each.is_dir() and any(each.glob("*.json")))


def read_work_folder(path: Path) -> dict[str, ScoredRun]:
    """Read what one model did.

    Args:
        path: the folder of a run (named by its time), or ``results/MODEL`` in it.

    Returns:
        Benchmark to its run; data sets that are subjects of one benchmark are one run.

    Raises:
        ConfigError: there are several models.
        DataError: a file cannot be read, has no single questions, or its questions do not give its accuracy.
    """
    models = _models(path)
    if len(models) > 1:
        names = ", ".join(f"{RESULTS}/{each.name}" for each in models)
        raise ConfigError(f"`runs` names `{path}`, which holds several models ({names}). Name one of them.")
    folder = models[0]
    rows: dict[str, list[tuple[Outcome, QuestionText]]] = {}
    for file in sorted(folder.glob("*.json")):
        name = next((known for start, known in FAMILIES.items() if file.stem.startswith(start)), file.stem)
        predictions = folder.parent.parent / PREDICTIONS / folder.name / file.name
        rows.setdefault(name, []).extend(_read(file, predictions))
    return {name: imported(name, folder, TOOL, folder.name, "correct", found) for name, found in rows.items()}


def _read(file: Path, predictions: Path) -> list[tuple[Outcome, QuestionText]]:
    values = _object(file)
    details = values.get("details")
    if isinstance(details, list):
        details = {str(place): each for place, each in enumerate(details)}
    if not isinstance(details, dict):
        raise DataError(f"it has no `details`, so no question by itself. {AGAIN}", path=file)
    numbered = {int(name): each for name, each in details.items() if _PLACE.fullmatch(name)}
    if sorted(numbered) != list(range(len(numbered))) or not numbered:
        raise DataError(f"`details` must have the questions 0, 1, 2, ... without a gap. {AGAIN}", path=file)
    prompts = _prompts(predictions, numbered)
    rows = [
        (outcome_of(file.stem, place, _score(numbered[place], place, file)), prompts[place])
        for place in sorted(numbered)
    ]
    _check_accuracy(values, [outcome.value for outcome, _ in rows], file)
    return rows


def _object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"it cannot be read as a file of {TOOL} ({error}).", path=file) from None
    if not isinstance(values, dict):
        raise DataError(f"it is no file of {TOOL}: an object was expected.", path=file)
    return values


def _score(detail: object, place: int, file: Path) -> float:
    """Return the score of a question: a truth, several of them, or the answer beside the right one."""
    given = detail.get("correct") if isinstance(detail, dict) else None
    if isinstance(given, bool):
        return float(given)
    if isinstance(given, list) and given and all(isinstance(each, bool) for each in given):
        return sum(given) / len(given)
    if isinstance(detail, dict) and {"predictions", "references"} <= detail.keys() and given is None:
        return float(str(detail["predictions"]) == str(detail["references"]))
    raise DataError(
        f"question {place} of `details` has no `correct` that is true or false. {AGAIN}", path=file
    )


def _prompts(file: Path, details: Mapping[int, object]) -> list[QuestionText]:
    """Return what each question was asked by: of the predictions, or else of the details."""
    values: Mapping[str, Any] = _object(file) if file.is_file() else {}
    found: list[QuestionText] = []
    for place in sorted(details):
        detail, row = details[place], values.get(str(place))
        prompt = row.get("origin_prompt") if isinstance(row, dict) else None
        if prompt is None and isinstance(detail, dict):
            prompt = detail.get("prompt")
        if prompt is None:
            raise DataError(
                f"question {place} has no `origin_prompt`, by which it could be known. Keep the folder"
                f" `{PREDICTIONS}` beside `{RESULTS}`.",
                path=file,
            )
        found.append(QuestionText(_said_last(prompt)))
    return found


def _said_last(prompt: object) -> str:
    """Return the last words of the user: what stands before them are examples, the same for all."""
    if isinstance(prompt, list):
        said = [str(each.get("prompt", "")) for each in prompt if isinstance(each, dict) and _is_user(each)]
        return said[-1] if said else json.dumps(prompt, ensure_ascii=False)
    return str(prompt)


def _is_user(turn: Mapping[str, Any]) -> bool:
    return str(turn.get("role", "")).upper() in ("HUMAN", "USER")


def _check_accuracy(values: Mapping[str, Any], scores: list[float], file: Path) -> None:
    written = values.get("accuracy", values.get("score"))
    mean = 100 * sum(scores) / len(scores)
    # Compared, not subtracted: a whole number may be larger than any float.
    if isinstance(written, int | float) and not mean - ROUNDING <= written <= mean + ROUNDING:
        said = f"{written:.2f}" if -1000 < written < 1000 else f"{str(written)[:12]}..."
        raise DataError(
            f"its questions give {mean:.2f} %, but it says {said} %: the scores of single questions"
            f" are not those of its figure. {AGAIN}",
            path=file,
        )
