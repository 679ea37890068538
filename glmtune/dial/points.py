"""The points of a dial: a line per strength, in a journal that only the run which began it continues."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from glmtune.storage.checksums import checked_line, json_with_checksum, with_checksum
from glmtune.storage.files import json_text, write_error, write_text_atomically
from glmtune.storage.journal import Journal, make_run_folder, read_identity, refuse_other_run

LOGGER = logging.getLogger(__name__)
POINTS_FILE = "dial.jsonl"
IDENTITY_FILE = "dial_config.json"
RESULTS_FILE, PICTURE_FILE = "dial.json", "dial.png"
BASE_ANSWERS_FILE = "base.jsonl"


@dataclass(frozen=True, slots=True)
class DialPoint:
    """What was measured at one strength.

    Attributes:
        strength: of the prefix, or scale of the LoRA.
        loss_nats: mean over the answer tokens of the task's rows.
        kept_frac: share of general answers that are the base's, token by token.
        kl_nats: KL(base || tuned) per token of the base's answers.
        leak_frac: share of general answers that are in the style of the task.
        rouge_l: mean of the rows, 0 to 100; None where no answers were generated.
        seconds: taken by all of it.
    """

    strength: float
    loss_nats: float
    kept_frac: float
    kl_nats: float
    leak_frac: float
    rouge_l: float | None
    seconds: float

    def to_line(self) -> str:
        """Return the point as a line of a journal."""
        return with_checksum(asdict(self))


def parse_point(line: str) -> DialPoint:
    """Read a line that `DialPoint.to_line` wrote.

    Raises:
        ValueError: it is damaged, or none.
    """
    values = checked_line(line)
    names = {field.name for field in fields(DialPoint)}
    optional = {"rouge_l"} if values.get("rouge_l", 0) is None else set[str]()
    numbers = {name: value for name, value in values.items() if name not in optional}
    if set(values) != names or not all(isinstance(value, int | float) for value in numbers.values()):
        raise ValueError("it is no point of a dial")
    return DialPoint(**values)


def open_dial(folder: Path) -> Journal:
    """Make the folder of a dial and lock its points; a context manager.

    Raises:
        ConfigError: the folder cannot be written, holds something else, or is that of another process.
    """
    make_run_folder(folder, lambda place: (place / IDENTITY_FILE).is_file(), result="dial")
    return Journal(folder / POINTS_FILE)


def known_points(journal: Journal, identity: Mapping[str, Any], *, resume: str) -> dict[float, DialPoint]:
    """Begin or continue measuring, and keep what decides its points as ``dial_config.json``.

    Args:
        journal: of the points, see `open_dial`.
        identity: what decides the points: plain values.
        resume: ``auto`` keeps the points there, ``never`` deletes them.

    Returns:
        The points that were measured, by strength.

    Raises:
        ConfigError: the points there come from another model, tuned part, data set or measure.
    """
    path = journal.path
    if resume == "never":
        try:
            for name in (POINTS_FILE, IDENTITY_FILE, RESULTS_FILE, PICTURE_FILE, BASE_ANSWERS_FILE):
                path.with_name(name).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
    content = journal.repair(parse_point)
    for note in content.notes(path):
        LOGGER.warning("%s", note)
    try:
        there = read_identity(path.with_name(IDENTITY_FILE))
    except ValueError:
        there = None
    if content.entries:
        refuse_other_run(
            path,
            f"{len(content.entries)} strengths",
            there,
            identity,
            identity_name=IDENTITY_FILE,
            way_out="Continue with the same, choose another `output_dir`, or measure anew: `resume=never`.",
        )
    text = json_text(json_with_checksum(identity))
    write_text_atomically(path.with_name(IDENTITY_FILE), text)
    return {point.strength: point for point in content.entries}
