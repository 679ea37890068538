"""Files of predictions: the rows of ours, and the format of the official script beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError, DataError
from glmtune.journal import read_identity

PREDICTIONS_NAME = "generated_predictions.jsonl"
OFFICIAL_NAME = "generated_predictions.txt"
IDENTITY_NAME = "predict_config.json"
SHOWN_PROBLEMS = 10
"""Bad lines named in an error: a file of another format has as many as it has lines."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row of a predictions file.

    Attributes:
        row: 0-based place of the row in its data set.
        prediction: the generated text.
        reference: the text it is scored against, cut as the protocol says; None if the data has none.
        prompt: the rendered prompt; empty in the official format, which does not keep it.
        stop_reason: ``eos`` or ``length``; empty if unknown.
        num_new_tokens: tokens generated, end token included; 0 if unknown.
        full_reference: the uncut reference where cutting changed it.
        scores: the row's scores by metric, as far as they were computed.
    """

    row: int
    prediction: str
    reference: str | None
    prompt: str = ""
    stop_reason: str = ""
    num_new_tokens: int = 0
    full_reference: str | None = None
    scores: Mapping[str, float] | None = None

    def to_line(self) -> str:
        """Return the row as one JSON line, newline included."""
        values: dict[str, Any] = {"row": self.row, "prompt": self.prompt, "prediction": self.prediction}
        values |= {"reference": self.reference}
        if self.full_reference is not None:
            values["full_reference"] = self.full_reference
        values |= {"stop_reason": self.stop_reason, "num_new_tokens": self.num_new_tokens}
        if self.scores is not None:
            values["scores"] = dict(self.scores)
        return json.dumps(values, ensure_ascii=False) + "\n"


def find_predictions(path: str | Path, setting: str) -> Path:
    """Return the predictions file that a path means.

    Args:
        path: the file itself, a folder holding it, or a run folder with a folder ``predict`` holding it.
        setting: the config path the user gave it under, for the message.

    Raises:
        ConfigError: there is none.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    folders = (given, given / "predict")
    for folder in folders:
        for name in (PREDICTIONS_NAME, OFFICIAL_NAME):
            if (folder / name).is_file():
                return folder / name
    if not given.exists():
        rule = "there is no such file or folder"
    else:
        rule = f"neither it nor its folder `predict` holds {PREDICTIONS_NAME} or {OFFICIAL_NAME}"
    raise ConfigError(
        f"`{setting}` is `{path}`, but {rule}. Give a predictions file, or the output folder of"
        " `glmtune predict`."
    )


def read_predictions(path: Path) -> list[Prediction]:
    """Read a whole predictions file, ours or the official one, in the order of its rows.

    Args:
        path: ``generated_predictions.jsonl`` of ours (``prediction``, ``reference``), or the official
            ``generated_predictions.txt`` (``predict``, ``labels``; also as the first release wrote it, all
            objects on one line).

    Raises:
        DataError: unreadable lines, missing fields, rows that occur twice, or no row at all; with the lines.
    """
    found: list[Prediction] = []
    problems: list[tuple[int, str]] = []
    for line, text in enumerate(_decode(path).split("\n"), start=1):
        try:
            for values in _objects(text):
                found.append(_prediction(values, len(found)))
        except ValueError as error:
            problems.append((line, str(error)))
    if problems:
        shown = "; ".join(f"line {line}: {problem}" for line, problem in problems[1:SHOWN_PROBLEMS])
        more = f" ({len(problems) - 1} more bad lines: {shown})" if shown else ""
        raise DataError(
            f"{problems[0][1]}{more}. Correct or remove what is wrong.", path=path, line=problems[0][0]
        )
    if not found:
        raise DataError("holds no predictions. Run `glmtune predict` first.", path=path)
    refuse_twins(found, path)
    return sorted(found, key=lambda prediction: prediction.row)


def parse_prediction(line: str) -> Prediction:
    """Read one line of our own file, as `Prediction.to_line` writes it.

    Raises:
        ValueError: it is no such object; the message says why.
    """
    values = json.loads(line)
    if not isinstance(values, dict) or "row" not in values:
        raise ValueError("a JSON object with the field `row` is needed")
    return _prediction(values, 0)


def identity_beside(predictions_file: Path) -> Mapping[str, Any] | None:
    """Return what is known about how a predictions file was made, None if nothing is.

    Args:
        predictions_file: the file; ``predict_config.json`` beside it is read.

    Raises:
        DataError: that file is no JSON object.
    """
    path = predictions_file.with_name(IDENTITY_NAME)
    try:
        return read_identity(path)
    except json.JSONDecodeError as error:
        raise DataError(f"is no JSON: {error}. Delete it to go on without it.", path=path) from None
    except ValueError:
        raise DataError("is no JSON object. Delete it to go on without it.", path=path) from None


def _decode(path: Path) -> str:
    content = path.read_bytes()
    # Files edited on a Chinese Windows are GB18030; almost no such text is valid UTF-8, so that goes first.
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError("is neither UTF-8 nor GB18030 text. Save it as UTF-8.", path=path)


def _objects(line: str) -> Iterator[Any]:
    """Yield the JSON values of a line; the first official release wrote them without line breaks."""
    decoder = json.JSONDecoder()
    rest = line.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except json.JSONDecodeError as error:
            shown = rest if len(rest) <= 60 else f"{rest[:60]}..."
            raise ValueError(f"`{shown}` is no JSON object ({error.msg})") from None
        yield value
        rest = rest[end:].strip()


def _prediction(values: Any, place: int) -> Prediction:
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object is needed, not {type(values).__name__}")
    if "predict" in values and "labels" in values:
        return Prediction(place, _text(values, "predict"), _text(values, "labels"))
    if "prediction" not in values or "reference" not in values:
        raise ValueError(
            "the fields `prediction` and `reference` (or, as the official script writes them, `predict` and"
            f" `labels`) are needed, but the fields are: {', '.join(map(str, values)) or 'none'}"
        )
    row = values.get("row", place)
    if not isinstance(row, int):
        raise ValueError(f"`row` is {row!r}, but it must be an integer")
    scores, full = values.get("scores"), values.get("full_reference")
    return Prediction(
        row=row,
        prediction=_text(values, "prediction"),
        reference=None if values["reference"] is None else _text(values, "reference"),
        prompt=str(values.get("prompt", "")),
        stop_reason=str(values.get("stop_reason", "")),
        num_new_tokens=_count(values.get("num_new_tokens", 0)),
        full_reference=None if full is None else str(full),
        scores=scores if isinstance(scores, dict) else None,
    )


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise ValueError(f"`{key}` is {value!r}, but it must be a text")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"`num_new_tokens` is {value!r}, but it must be an integer")
    return value


def refuse_twins(predictions: Sequence[Prediction], path: Path) -> None:
    """Refuse predictions of which two answer the same row.

    Raises:
        DataError: there are two; with the row.
    """
    seen: set[int] = set()
    for prediction in predictions:
        if prediction.row in seen:
            raise DataError(f"row {prediction.row} occurs twice. Remove one of them.", path=path)
        seen.add(prediction.row)
