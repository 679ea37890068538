"""The trials of a sweep, and the journal of what became of them.

    SWEEP/sweep.jsonl          a line for every trial that ended, the last one of a trial counts
    SWEEP/sweep_config.json    what decides whether a command goes on with them
    SWEEP/trials/NAME          the run folder of a trial, which `glmtune train` resumes by itself
    SWEEP/logs/NAME.log        what it said
    SWEEP/scores/NAME/METRIC   what `predict` or `eval` measured of it, where the metric is theirs

A trial is named by its values and its seed, so the folder tells what is there without any table, and values
that are added later find those that are trained already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError
from glmtune.storage.checksums import checked_line, json_with_checksum, with_checksum
from glmtune.storage.files import json_text, write_text_atomically
from glmtune.storage.journal import Journal, make_run_folder, read_identity
from glmtune.sweep.space import Point

LOGGER = logging.getLogger(__name__)
JOURNAL_FILE = "sweep.jsonl"
IDENTITY_FILE = "sweep_config.json"
TRIALS, LOGS, SCORES = "trials", "logs", "scores"
DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        point: its values.
        seed: its seed.
        folder: its run folder.
        log: what it says goes there.
        words: of its `glmtune train`, output folder and seed included.
        settings: all settings that these words mean, nested plain values.
    """

    point: Point
    seed: int
    folder: Path
    log: Path
    words: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Names folder, log and record."""
        return self.folder.name


def trial_name(point: Point, seed: int) -> str:
    """Return the name of a trial."""
    return f"{point.name}_seed={seed}"


@dataclass(frozen=True)
class TrialRecord:
    """What became of a trial.

    Attributes:
        name: of the trial.
        words: that trained it.
        state: ``done`` or ``failed``.
        figures: metrics by name, of the run and of what scored it since.
        seconds: that it took; a run that was interrupted counts its last session.
        exit_code: of the process that ended it; negative for a signal.
        reason: why it failed; empty if it did not.
    """

    name: str
    words: tuple[str, ...]
    state: str
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    exit_code: int = 0
    reason: str = ""

    @property
    def is_done(self) -> bool:
        """Whether it was trained to its end."""
        return self.state == DONE

    def to_line(self) -> str:
        """Return the record as a line of a journal."""
        return with_checksum(asdict(self))


def parse_record(line: str) -> TrialRecord:
    """Read a line that `TrialRecord.to_line` wrote.

    Raises:
        ValueError: it is damaged, or none.
    """
    values = checked_line(line)
    try:
        values["words"] = tuple(values["words"])
        record = TrialRecord(**values)
        if record.state not in (DONE, FAILED) or not all(
            isinstance(value, int | float) for value in record.figures.values()
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError("it is no record of a trial") from None
    return record


def open_sweep(folder: Path, identity: Mapping[str, Any]) -> Journal:
    """Make the folder of a sweep and lock it, or go on with the one that is there; a context manager.

    Args:
        folder: of the sweep.
        identity: what decides whether this is the sweep that is there, plain values by name.

    Raises:
        ConfigError: the folder cannot be written, holds something else or another sweep, or another process
            has it.
    """
    make_run_folder(folder, lambda place: (place / IDENTITY_FILE).is_file(), result="sweep")
    with ExitStack() as held:
        journal = held.enter_context(Journal(folder / JOURNAL_FILE))
        # First of all files: without it nobody knows that the folder is a sweep's.
        _begin_or_continue(folder, identity)
        for name in (TRIALS, LOGS):
            (folder / name).mkdir(exist_ok=True)
        held.pop_all()
    return journal


def known_records(journal: Journal) -> dict[str, TrialRecord]:
    """Return what became of earlier trials, by name; a line that a kill cut off is dropped."""
    content = journal.repair(parse_record)
    for note in content.notes(journal.path):
        LOGGER.warning("%s", note)
    return {record.name: record for record in content.entries}


def _begin_or_continue(folder: Path, identity: Mapping[str, Any]) -> None:
    """Keep what decides whether a later command goes on with this sweep, or refuse to go on."""
    path = folder / IDENTITY_FILE
    try:
        there = read_identity(path)
    except ValueError:  # damaged; the trials are checked one by one
        there = None
    changed = [
        f"{name}: {there.get(name)} then, {value} now"
        for name, value in identity.items()
        if there is not None and there.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds another sweep ({'; '.join(changed)}). A sweep may grow by values, seeds"
            " (`sweep.repeats`) and trials (`sweep.trials`), and be read by another metric in a grid. For"
            " anything else name another `output_dir`."
        )
    write_text_atomically(path, json_text(json_with_checksum(identity)))


def refuse_other_runs(trials: Iterable[Trial], records: Mapping[str, TrialRecord]) -> None:
    """Refuse to put new trials beside those that other settings trained.

    Settings that decide no number (see ``glmtune.training.starting.changes``) may differ.

    Args:
        trials: of today.
        records: of earlier ones.

    Raises:
        ConfigError: a trial was trained with settings that differ.
    """
    for trial in trials:
        record = records.get(trial.name)
        if record is not None and not record.is_done:
            continue
        changes = changes_of(trial)
        if changes is None:  # not begun, or its folder was removed to make room
            changes = sorted(set(record.words) ^ set(trial.words)) if record is not None else []
        if changes:
            raise ConfigError(
                f"{trial.folder} was trained with other settings ({'; '.join(changes)}), and a table of both"
                " would compare what is not alike. Repeat them, or name another `output_dir`."
            )


def changes_of(trial: Trial) -> list[str] | None:
    """List the settings that decide numbers and differ from those of the run in a trial's folder.

    Args:
        trial: of today.

    Returns:
        Each in words; None where no run is there.

    Raises:
        ConfigError: its settings cannot be read.
    """
    from glmtune.training.run_folder import CONFIG_FILE
    from glmtune.training.starting.changes import changed_settings

    stored = _stored(trial.folder / CONFIG_FILE)
    if stored is None:
        return None
    here = dict(trial.settings)
    if not (here.get("launch") or {}).get("num_processes"):  # as many as there were then
        here["launch"] = stored.get("launch")
    return changed_settings(stored, here)


def _stored(file: Path) -> dict[str, Any] | None:
    import yaml

    from glmtune.storage.yaml_text import read_yaml

    try:
        values = read_yaml(file)
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file} cannot be read as the settings of a run ({error}). Restore it, or name another"
            " `output_dir`."
        ) from None
    return values if isinstance(values, dict) else None
