"""The log of a run, ``trainer_log.jsonl``: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG_FILE = "trainer_log.jsonl"


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log, oldest first; a last line cut off by a kill is left out."""
    entries: list[dict[str, Any]] = []
    try:
        lines = (run / LOG_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return entries
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def append_entry(run: Path, entry: dict[str, Any]) -> None:
    """Add one line to a run's log."""
    with (run / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
