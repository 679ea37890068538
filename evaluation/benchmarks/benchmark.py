"""What every benchmark says about itself, and what its loaders share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from evaluation.metrics import Groups
from evaluation.sample import Sample
from evaluation.task import PreparedProtocol
from glmtune.errors import DataError
from glmtune.storage.checksums import checked_json
from glmtune.storage.records import SHOWN_CHARS, Count, Record, shown, validated

SAMPLE_SET_FILE = "sample_set.json"
SHOWN_FIELDS = 10
WAY_OUT = (
    "Download the official files again (`glmtune data fetch {name}`). A set of your own in this layout needs"
    f" a {SAMPLE_SET_FILE} saying how many rows it has; see data/ceval_sample."
)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a protocol needs to know before it can write prompts.

    Attributes:
        folder: where the exemplars are.
        subjects: the subjects asked, whose exemplars are read.
        is_chat: whether prompts are conversations.
    """

    folder: Path
    subjects: tuple[str, ...]
    is_chat: bool


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as data.

    Attributes:
        name: as in ``benchmark=NAME``.
        title: for readers.
        licence: of the official data.
        splits: names of its splits, the one evaluated by default first.
        subjects: all subjects in the official order.
        protocols: name to the function that prepares the protocol.
        chat_protocol: the one of the published GLM tables for chat models.
        base_protocol: the same for base models.
        groups: how its subjects are averaged, by split.
        is_here: whether a folder holds it.
        load: folder, split and subjects to samples; row counts are checked.
        folder_names: names that a folder with it may have inside a folder of benchmarks.
        own_subjects: folder and split to the subjects of a user's own there; None where there can be none.
        published_repeats: split, subject and index of questions that the official files have among the
            exemplars as well; they are asked all the same, as in every published figure.
        home: the folder of its files where that is known; None: it is looked for.
        part_of: name of the benchmark whose files it is asked from, where it has none of its own; else empty.
    """

    name: str
    title: str
    licence: str
    splits: tuple[str, ...]
    subjects: tuple[str, ...]
    protocols: Mapping[str, Callable[[Ask], PreparedProtocol]]
    chat_protocol: str
    base_protocol: str
    groups: Callable[[str], Groups]
    is_here: Callable[[Path], bool]
    load: Callable[[Path, str, Sequence[str]], list[Sample]]
    folder_names: tuple[str, ...] = field(default=())
    own_subjects: Callable[[Path, str], tuple[str, ...]] | None = None
    published_repeats: frozenset[tuple[str, str, int]] = frozenset()
    home: Path | None = None
    part_of: str = ""


class _SampleSet(Record):
    """The description of a sample set."""

    rows: dict[str, dict[str, Count]]


@cache
def subject_table(name: str) -> dict[str, dict[str, Any]]:
    """Read ``NAME.yaml`` beside this file once: subject to what is known about it."""
    from glmtune.storage.yaml_text import read_yaml

    return read_yaml(Path(__file__).with_name(f"{name}.yaml"))


def sample_set_rows(folder: Path, split: str) -> dict[str, int] | None:
    """Return subject to rows for a set that is not the official one; None for official data.

    Raises:
        DataError: its description cannot be read, or has no such split.
    """
    path = folder / SAMPLE_SET_FILE
    if not path.is_file():
        return None
    try:
        rows = validated(_SampleSet, checked_json(path.read_text(encoding="utf-8"))).rows
    except (OSError, ValueError) as error:
        raise DataError(
            f"this description of a sample set cannot be read ({error}). It must be a JSON object like"
            ' {"rows": {"val": {"logic": 15}}}.',
            path=path,
        ) from None
    if split not in rows:
        raise DataError(f"this sample set has no split `{split}`; it has: {_names(rows)}.", path=path)
    return rows[split]


def expected_rows(own: Mapping[str, int] | None, subject: str, official: int) -> int:
    """Return how many rows a subject must have.

    Args:
        own: of `sample_set_rows`.
        subject: whose; one that a set of one's own does not name has none.
        official: as many as the official files have.
    """
    return official if own is None else own.get(subject, 0)


def check_rows(path: Path, found: int, expected: int | None, *, name: str, way_out: str = WAY_OUT) -> None:
    """Raise DataError unless a file has as many rows as it must have.

    An accuracy over some of the rows looks like any other, so a file cut off or read wrongly is refused here.

    Args:
        path: the file.
        found: rows read from it.
        expected: rows it must have; None where only its owner knows.
        name: of the benchmark.
        way_out: what to do about it.
    """
    if expected is None:
        if not found:
            raise DataError("this file has no questions.", path=path)
        return
    if found != expected:
        hint = ""
        if found == expected - 1:
            hint = " One row too few often means that a tool took the first row for a header."
        raise DataError(
            f"{found} rows, but this file of {name} must have {expected}.{hint} {way_out.format(name=name)}",
            path=path,
        )


def read_text(path: Path, *, name: str, way_out: str = WAY_OUT) -> str:
    """Read a data file as UTF-8 (a byte order mark is dropped), its line ends untouched.

    Raises:
        DataError: it is absent or no UTF-8.
    """
    # Bytes, not text mode: it would turn CRLF into LF, and prompts must be those of the official files to
    # the byte.
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"this file of {name} is missing. {way_out.format(name=name)}", path=path) from None
    except OSError as error:
        raise DataError(
            f"this file of {name} cannot be read ({error.strerror or error}).", path=path
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"this file is not UTF-8 (byte {error.start}). {way_out.format(name=name)}", path=path
        ) from None


def json_lines(path: Path, *, name: str, way_out: str = WAY_OUT) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number (from 1) and object of every line that is not empty.

    Raises:
        DataError: a line is no JSON object.
    """
    for number, line in enumerate(read_text(path, name=name, way_out=way_out).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"no JSON ({error}). {way_out.format(name=name)}", path=path, line=number
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"a JSON object was expected, found {line[:60]!r}.", path=path, line=number)
        yield number, row


def field_of(row: object, key: str, path: Path, line: int) -> str:
    """Return a text field of a row.

    Raises:
        DataError: the row is no object, or the field is absent or no text.
    """
    if not isinstance(row, dict):
        raise DataError(f"a JSON object was expected, found {shown(row)}.", path=path, line=line)
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(
            f"the field `{key}` is {'absent' if value is None else 'no text'}. Fields here: {_names(row)}.",
            path=path,
            line=line,
        )
    return value


def _names(values: Iterable[str]) -> str:
    return ", ".join(name[:SHOWN_CHARS] for name in list(values)[:SHOWN_FIELDS])
