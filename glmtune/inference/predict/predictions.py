"""Files of predictions: the rows of ours, and the format of the official script beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from glmtune.errors import ConfigError, DataError
from glmtune.storage.checksums import KEY, checked_line, with_checksum
from glmtune.storage.journal import read_identity
from glmtune.storage.records import SHOWN_CHARS, Count, OptionalText, Record, Text, validated

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
        is_tuned: whether what was tuned applied, where a switch decided that; None: none did.
        thoughts: what the model thought before its answer, which is not scored; empty: nothing.
    """

    row: int
    prediction: str
    reference: str | None
    prompt: str = ""
    stop_reason: str = ""
    num_new_tokens: int = 0
    full_reference: str | None = None
    scores: Mapping[str, float] | None = None
    is_tuned: bool | None = None
    thoughts: str = ""

    def to_line(self) -> str:
        """Return the row as one JSON line with its checksum, newline included."""
        values: dict[str, Any] = {"row": self.row, "prompt": self.prompt, "prediction": self.prediction}
        values |= {"reference": self.reference}
        if self.full_reference is not None:
            values["full_reference"] = self.full_reference
        values |= {"stop_reason": self.stop_reason, "num_new_tokens": self.num_new_tokens}
        if self.thoughts:
            values["thoughts"] = self.thoughts
        if self.is_tuned is not None:
            values["is_tuned"] = self.is_tuned
        if self.scores is not None:
            values["scores"] = dict(self.scores)
        return with_checksum(values)


class _Row(Record):
    """A row of our own files."""

    row: Annotated[Count, Field(description="the number of a row, from 0")]
    prediction: Text
    reference: OptionalText
    prompt: Text = ""
    stop_reason: Text = ""
    num_new_tokens: Count = 0
    full_reference: OptionalText = None
    thoughts: Text = ""
    is_tuned: Annotated[bool | None, Field(description="true, false or null")] = None
    # Whole numbers stay such, so that a row that is read and written again has the same bytes.
    scores: Annotated[
        dict[str, int | float] | None, Field(description="an object with a number for each metric, or null")
    ] = None


class _OfficialRow(Record):
    """A row of the official script's files."""

    predict: Text
    labels: Text


class _LabelledRow(Record):
    """A row as LLaMA-Factory writes it."""

    predict: Text
    label: OptionalText
    prompt: Text = ""


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
            objects on one line), or LLaMA-Factory's (``prompt``, ``predict``, ``label``).

    Raises:
        DataError: unreadable lines, missing fields, rows that occur twice, or no row at all; with the lines.
    """
    found: list[Prediction] = []
    problems: list[tuple[int, str]] = []
    for line, text in enumerate(_decode(path).split("\n"), start=1):
        try:
            # A line of ours is whole or damaged; the official script's may hold several objects.
            is_ours = f'"{KEY}"' in text
            for values in [checked_line(text)] if is_ours else _objects(text):
                found.append(_prediction(values, len(found)))
        except (ValueError, RecursionError) as error:
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
    return _prediction({"row": None, **checked_line(line)}, 0)


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
    except ValueError as error:
        raise DataError(
            f"is no JSON object that can be used: {error}. Delete it to go on without it.", path=path
        ) from None


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error}).", path=path) from None
    # Files edited on a Chinese Windows are GB18030; almost no such text is valid UTF-8, so that goes first.
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    if f'"{KEY}"'.encode() in content:
        raise DataError("is no UTF-8 here, as we wrote it: damaged. Remove the line.", path=path, line=line)
    try:
        return content.decode("gb18030")
    except UnicodeDecodeError:
        raise DataError(
            "is neither UTF-8 nor GB18030 text. Save it as UTF-8.", path=path, line=line
        ) from None


def _objects(line: str) -> Iterator[Any]:
    """Yield the JSON values of a line; the first official release wrote them without line breaks."""
    decoder = json.JSONDecoder()
    place = _skip_blanks(line, 0)
    while place < len(line):
        try:
            value, place = decoder.raw_decode(line, place)
        except json.JSONDecodeError as error:
            rest = line[place : place + SHOWN_CHARS + 1]
            part = rest if len(rest) <= SHOWN_CHARS else f"{rest[:SHOWN_CHARS]}..."
            raise ValueError(f"`{part.strip()}` is no JSON object ({error.msg})") from None
        yield value
        place = _skip_blanks(line, place)


def _skip_blanks(line: str, place: int) -> int:
    while place < len(line) and line[place].isspace():
        place += 1
    return place


def _prediction(values: Any, place: int) -> Prediction:
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object is needed, not {type(values).__name__}")
    if "predict" in values and "labels" in values:
        official = validated(_OfficialRow, values)
        return Prediction(place, official.predict, official.labels)
    if "predict" in values and "label" in values:
        labelled = validated(_LabelledRow, values)
        return Prediction(place, labelled.predict, labelled.label, labelled.prompt)
    if "prediction" not in values or "reference" not in values:
        raise ValueError(
            "the fields `prediction` and `reference` (or, of other scripts, `predict` and `labels` or"
            f" `label`) are needed, but the fields are: {_fields(values)}"
        )
    return Prediction(**validated(_Row, {"row": place, **values}).model_dump())


def _fields(values: Mapping[str, Any]) -> str:
    names = ", ".join(name[:SHOWN_CHARS] for name in list(values)[:SHOWN_PROBLEMS]) or "none"
    return f"{names}, ..." if len(values) > SHOWN_PROBLEMS else names


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
