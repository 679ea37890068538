"""The log of a run, ``trainer_log.jsonl``: one JSON object a line, each with a checksum as its last key."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from glmtune.storage.checksums import checked_json, json_with_checksum
from glmtune.storage.files import write_text

LOGGER = logging.getLogger(__name__)
LOG_FILE = "trainer_log.jsonl"
BRANCHED = "branched"
"""The alert with which a log begins whose run goes on from a checkpoint of another run, after its step."""
# The checksum leaves these out, so that the lines of a run that was killed and resumed are those of one that
# never was, checksum and all.
CLOCK = frozenset(
    {"time", "tokens_per_second", "seconds_per_step", "memory_bytes", "eval_runtime"}
    | {"eval_retention_runtime"}
)
"""What differs from run to run although the same is computed."""


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log, oldest first.

    A damaged line is left out, with a warning; so is, in silence, a last line cut off by a kill.

    Raises:
        OSError: the log is there, but cannot be read.
    """
    entries: list[dict[str, Any]] = []
    try:
        content = (run / LOG_FILE).read_bytes()
    except FileNotFoundError:
        return entries
    *lines, cut_off = content.split(b"\n")
    if _is_whole(cut_off):
        lines.append(cut_off)  # an editor left the last line end out, or it is damaged, which is said
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(_entry(line))
        except ValueError as error:
            LOGGER.warning("%s, line %d is left out: %s", run / LOG_FILE, number, error)
    return entries


def _is_whole(line: bytes) -> bool:
    """Whether all of an entry is there, whatever follows: a kill leaves less than that."""
    try:
        json.JSONDecoder().raw_decode(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):  # brackets nested by the thousand are no entry
        return False
    return True


def append_entry(run: Path, entry: Mapping[str, Any]) -> None:
    """Add one line to a run's log, with the time of day (UTC, as ISO 8601 writes it)."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (run / LOG_FILE).open("a", encoding="utf-8", newline="\n") as file:
        file.write(_line({**entry, "time": now}))


def write_log(run: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Replace a run's log.

    Raises:
        OSError: the disk is full; the old log is kept.
    """
    write_text(run / LOG_FILE, "".join(_line(entry) for entry in entries))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(json_with_checksum(entry, apart=CLOCK)) + "\n"


def _entry(line: bytes) -> dict[str, Any]:
    entry = checked_json(line.decode("utf-8-sig"), apart=CLOCK)
    wanted = ["step"]
    if "loss" in entry:
        wanted += ["loss", "learning_rate", "tokens", "tokens_per_second", "memory_bytes"]
    elif "eval_loss" in entry:
        wanted += ["eval_loss", "eval_accuracy"]
    if "eval_retention" in entry:
        wanted += ["eval_retention", "eval_retention_kl", "eval_leak_rate"]
    for name in wanted:
        if not isinstance(entry.get(name), int | float):
            raise ValueError(f"damaged: `{name}` is no number")
    return entry


def sets_of(entry: Mapping[str, Any]) -> list[str]:
    """Return the sets of a mixture that were evaluated apart.

    Args:
        entry: a line of ``trainer_log.jsonl``.
    """
    found = (re.fullmatch(r"eval_(.+)_loss", name) for name in entry)
    return [match[1] for match in found if match is not None and match[1] != "switched"]
