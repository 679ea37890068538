"""The folder of one run: is it new, does it hold a run to go on with, is that run already finished?

That is decided first (`plan_start`) and only read for; the folder changes when the first step is about to run
(`open_run`), after model, data, trackers and the checkpoint's contents have proved fit. Whatever fails before
leaves the folder byte for byte as it was, and what is replaced afterwards lies in ``previous/``.

A resumed run must end with the very numbers of one that was never stopped, so every setting that decides them
has to be as it was; `glmtune.training.starting.changes` compares today's with config.yaml, and knows
which ones are free.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from glmtune.data import as_trained
from glmtune.data.lengths import LENGTHS
from glmtune.errors import ConfigError, TrainingError
from glmtune.storage.files import replaced_of, write_text
from glmtune.storage.lock import lock_folder
from glmtune.storage.manifest import read_manifest as parsed_manifest
from glmtune.storage.yaml_text import read_yaml
from glmtune.training.checkpoints.folder import (
    Search,
    checkpoint_at,
    newest_whole,
    own_checkpoints,
    publish,
    read_manifest,
    repair,
    run_entries,
    set_aside,
    step_of,
)
from glmtune.training.log import BRANCHED, LOG_FILE, append_entry, write_log
from glmtune.training.measuring.files import RETENTION
from glmtune.training.report import RESULTS_FILE, read_results
from glmtune.training.starting import tuned_before
from glmtune.training.starting.changes import (
    CHANGES_FILE,
    ROWS_PER_STEP,
    WORLD_HINT,
    changed_settings,
    changes_on_the_way,
    read_changes,
    record_changes,
    refuse_impossible_changes,
)
from glmtune.training.watching.rollback_log import (
    ROLLBACKS_FILE,
    keep_rollbacks,
    read_rollbacks,
)

CONFIG_FILE = "config.yaml"
TUNED = ("last", "best")
RECORDS = (ROLLBACKS_FILE, CHANGES_FILE)
"""What a run goes on with besides its checkpoint and its log."""
FORCED = "forced-"
"""Before the number of the folder in ``previous/`` that keeps what `resume=force` replaced of its own run."""


WAY_OUT = (
    "Name another `output_dir`, start anew with `resume=never` (the earlier run is kept in `previous/`), or "
    "go on with those of today by `resume=force`."
)
BRANCH_WAY_OUT = (
    "Repeat them; or begin a run of its own with what was tuned there: `prefix_path=`, `adapter_path=` or "
    "`init_from=` in place of `resume=`."
)
ORIGIN = (as_trained.KEY, tuned_before.KEY)
"""Facts of a manifest, besides fingerprints, that hold for the whole run."""
BEGINNING_PATHS = ("prefix_path", "adapter_path", "init_from")
"""Settings that name what a run begins with."""


@dataclass(frozen=True)
class RunStart:
    """How a run begins, decided before anything of its folder is touched.

    Attributes:
        folder: the run folder; it need not exist yet.
        settings: what `config.yaml` will say; empty: nothing.
        checkpoint: where to go on from; None starts at step 0.
        finished: results of a run that is already complete in this folder, else None.
        aside: what `open_run` moves into ``previous/``.
        copies: what it keeps there as well, as the run goes on with it.
        label: before the number of that folder, where less than a run is moved.
        damaged: newer checkpoints that the run cannot go on from, each with the reason.
        changes: settings that decide the numbers and changed (``resume=force``), in words.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    finished: dict[str, Any] | None = None
    aside: tuple[Path, ...] = ()
    copies: tuple[Path, ...] = ()
    label: str = ""
    damaged: Mapping[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    @property
    def is_branch(self) -> bool:
        """Whether the run goes on from a checkpoint of another run folder."""
        return self.checkpoint is not None and not _same(self.checkpoint.parent, self.folder)


def plan_start(output_dir: str, *, resume: str, settings: Mapping[str, Any]) -> RunStart:
    """Decide where training starts and what becomes of what is there. Nothing is written.

    Args:
        output_dir: the run folder.
        resume: ``auto``: go on from the newest whole checkpoint, if there is one; ``never``: start anew, an
            earlier run is set aside; ``force``: like auto, with the settings of today from the next step on;
            else the path of a checkpoint, of this folder or of another run, which then goes on here.
        settings: all settings of the run, nested plain values.

    Raises:
        ConfigError: the folder is a file or holds other things, settings that matter have changed (under
            ``force``: that no run can change on its way), or there is something tuned but no checkpoint to go
            on from.
        CheckpointError: ``resume`` names no whole checkpoint, or something cannot be read.
        TrainingError: the folder cannot be written.
    """
    folder = Path(output_dir).expanduser()
    _check_folder(folder)
    if resume == "never":
        aside = run_entries(folder)
        _refuse_busy(aside)
        _refuse_moving_the_beginning(aside, settings)
        return RunStart(folder, settings, aside=tuple(aside))
    named = None if resume in ("auto", "force") else checkpoint_at(Path(resume).expanduser())
    if named is not None and not _same(named.parent, folder):
        return _plan_branch(folder, named, settings)
    stored, results = _stored_settings(folder), _results(folder)
    own = own_checkpoints(folder)
    is_forced, changes = resume == "force", list[str]()
    if stored is not None:
        changes = changes_on_the_way(stored, settings) if is_forced else changed_settings(stored, settings)
        if results is not None or own:
            refuse_impossible_changes(stored, settings, folder)
            if changes and not is_forced:
                raise ConfigError(_other_settings(folder, changes))
    is_finished = results is not None and bool(results.get("finished"))
    if is_finished and resume == "auto":
        return RunStart(folder, settings, finished=results)
    for read in (read_rollbacks, read_changes):  # they refuse a damaged record while nothing is touched yet
        read(folder)
    search = newest_whole(folder) if named is None else Search(named, {})
    if search.checkpoint is None:
        _refuse_tuned(folder, search)
        # Killed before its first checkpoint. With other settings its log is that of another run.
        return RunStart(folder, settings, aside=tuple(run_entries(folder)) if changes else ())
    step = step_of(search.checkpoint) or 0
    aside = [path for path in own if (step_of(path) or 0) > step]
    repeats = named is None and not aside and not changes
    aside += [folder / name for name in TUNED if _is_replaced(folder / name, step, repeats=repeats)]
    if results is not None:
        aside.append(folder / RESULTS_FILE)
    copies = (folder / name for name in (CONFIG_FILE, LOG_FILE, *RECORDS) if aside or changes)
    return RunStart(
        folder,
        settings,
        search.checkpoint,
        aside=tuple(aside),
        copies=tuple(copies),
        label=FORCED if is_forced and not search.passed_over else "",
        damaged={path.name: problem for path, problem in search.passed_over.items()},
        changes=tuple(changes),
    )


def open_run(start: RunStart) -> Path | None:
    """Make the folder ready for the first step: what is replaced is set aside, settings are recorded.

    To be called when everything else has succeeded: from here on the folder is that of the new run. A kill
    anywhere in between leaves a folder that the same command, and the one before, can go on with.

    Args:
        start: what `plan_start` decided.

    Returns:
        Where earlier things were moved to; None where there were none.

    Raises:
        TrainingError: the folder cannot be written.
    """
    folder, checkpoint = start.folder, start.checkpoint
    step = step_of(checkpoint) or 0 if checkpoint else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_busy(start.aside)
        repair(folder)
        moved = set_aside(folder, start.aside, copies=start.copies, label=start.label)
        # Before config.yaml, from which a start after a kill would otherwise see no change any more.
        if (folder / CONFIG_FILE).exists():
            record_changes(folder, step, start.changes)
        # Before anything else: a folder without settings is not known to be that of a run.
        if start.settings:
            text = yaml.safe_dump(dict(start.settings), allow_unicode=True, sort_keys=False)
            write_text(folder / CONFIG_FILE, text)
        if checkpoint is None:
            write_text(folder / LOG_FILE, "")
        elif start.is_branch:
            _bring_along(checkpoint, folder, step)
        keep_rollbacks(folder, step)
        record_changes(folder, step, ())  # what a checkpoint of another run brought along, up to its step
        if checkpoint is not None:
            _offer_tuned(checkpoint, folder)
        for name, problem in start.damaged.items():
            text = f"{problem} of {name}; going on from step {step}; it is kept in {moved}"
            append_entry(folder, {"step": step, "alert": "damaged_checkpoint", "text": text})
    except OSError as error:
        raise TrainingError(_cannot_be_written(folder, error)) from error
    return moved


def _refuse_busy(aside: Iterable[Path]) -> None:
    """Make sure that no `predict` is at work in a folder that is about to be moved.

    Raises:
        ConfigError: one is.
    """
    for path in aside:
        if path.name.startswith("predict") and path.is_dir():
            with lock_folder(path):
                pass


def _refuse_moving_the_beginning(aside: Iterable[Path], settings: Mapping[str, Any]) -> None:
    """Refuse to set aside what the run begins with: after a kill it might have to begin once more.

    Raises:
        ConfigError: a setting names something in one of the folders.
    """
    moved = {path.resolve() for path in aside}
    for name in BEGINNING_PATHS:
        given = settings.get(name)
        place = Path(str(given)).expanduser().resolve() if given is not None else None
        if place is not None and moved & {place, *place.parents}:
            raise ConfigError(
                f"`{name}` is `{given}`, which `resume=never` would move into `previous/`. Name another "
                "`output_dir`, or move it elsewhere first."
            )


def _plan_branch(folder: Path, named: Path, settings: Mapping[str, Any]) -> RunStart:
    """Plan to go on in one folder with what another run began, which stays as it is."""
    stored = _stored_settings(named.parent)
    if stored is not None and (changes := changed_settings(stored, settings)):
        raise ConfigError(_other_settings(named.parent, changes, way_out=BRANCH_WAY_OUT))
    aside = run_entries(folder)
    if any(path.resolve() in named.resolve().parents for path in aside):
        raise ConfigError(
            f"`resume` is `{named}`, which lies in a part of `output_dir` that would be set aside. Name "
            "another `output_dir`."
        )
    return RunStart(folder, settings, named, aside=tuple(aside))


def _bring_along(checkpoint: Path, folder: Path, step: int) -> None:
    """Take over what a run goes on with: that checkpoint itself, its rollbacks.

    Not the log, which is kept where those steps were made; a line says where that is.
    """
    origin = checkpoint.parent
    text = f"goes on from {checkpoint}, where the log of the steps before lies"
    write_log(folder, [{"step": step, "alert": BRANCHED, "text": text}])
    for name in RECORDS:
        if (origin / name).is_file():
            shutil.copy2(origin / name, folder / name)
    if (origin / RETENTION).is_dir():  # what the base answered; what was tuned answered after other steps
        ignored = shutil.ignore_patterns("step-*.jsonl")
        shutil.copytree(origin / RETENTION, folder / RETENTION, ignore=ignored, dirs_exist_ok=True)
    publish(checkpoint, folder / checkpoint.name, manifest=read_manifest(checkpoint), whole=True)


def _offer_tuned(checkpoint: Path, folder: Path) -> None:
    """Have `last` and `best` be those of the checkpoint that a run goes on from.

    They are not where they were set aside, and where a kill came between a checkpoint and its publication.
    """
    facts = read_manifest(checkpoint) or {}
    if (_step_in(folder / "last") or -1) < (step_of(checkpoint) or 0):
        publish(checkpoint, folder / "last", manifest=facts)
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    step = state.get("best_global_step")
    source = checkpoint.parent / f"checkpoint-{step}"
    if step is None or (_step_in(folder / "best") or -1) >= step or read_manifest(source) is None:
        return
    origin = {name: value for name, value in facts.items() if name.endswith("_fingerprint") or name in ORIGIN}
    publish(source, folder / "best", manifest={**origin, "step": step, "metric": state.get("best_metric")})


def _refuse_tuned(folder: Path, search: Search) -> None:
    """Refuse to begin at step 0 where something tuned would be replaced by it."""
    tuned = [name for name in (*TUNED, RESULTS_FILE) if os.path.lexists(folder / name)]
    tuned += [replaced_of(folder / name).name for name in TUNED if replaced_of(folder / name).exists()]
    names = [path.name for path in search.passed_over]
    if not tuned and not names:
        return
    reasons = "".join(f"\n- {path.name}: {problem}" for path, problem in search.passed_over.items())
    raise ConfigError(
        f"{folder} holds what a run has made ({', '.join([*tuned, *names])}), but no checkpoint to go on from"
        f"{':' + reasons if reasons else '.'}"
        "\nStarting at step 1 would replace it. Restore a checkpoint; or name another `output_dir`, where "
        "`prefix_path=`, `adapter_path=` or `init_from=` begin from what was tuned here; or start anew with "
        "`resume=never` (the earlier run is kept in `previous/`)."
    )


def _step_in(tuned: Path) -> int | None:
    """Return the step that ``last`` or ``best`` is of; None where that is not known, or it is not there."""
    try:
        step = (parsed_manifest(tuned) or {}).get("step")
    except (OSError, ValueError):
        return None
    return step if isinstance(step, int) else None


def _is_replaced(tuned: Path, step: int, *, repeats: bool) -> bool:
    """Tell whether ``last`` or ``best`` is none of the run up to a step, and so is to be set aside.

    Where a run only repeats what it did before it was killed, `best` may be of a later step: the run comes to
    it again, just as it was.
    """
    found = _step_in(tuned)
    return found is None or (found > step and not repeats)


def check_fingerprints(
    checkpoint: Path, fingerprints: Mapping[str, str], *, may_change: Collection[str] = ()
) -> None:
    """Make sure that a checkpoint was made with the same model and data.

    Args:
        checkpoint: a complete checkpoint.
        fingerprints: of today, by name.
        may_change: names of those that may differ.

    Raises:
        ConfigError: one of them differs.
    """
    manifest = read_manifest(checkpoint) or {}
    for name, value in fingerprints.items():
        before = manifest.get(name, value)  # a checkpoint from before there was this fingerprint passes
        if before != value and name not in may_change:
            also = ", go on with the other rows by `resume=force`" if name == "data_fingerprint" else ""
            raise ConfigError(
                f"{checkpoint} was made with another {name.replace('_', ' ')}: {before} then, {value} now. A "
                f"run can only go on with what it began with. Restore it{also}, start anew with "
                "`resume=never`, or name another `output_dir`."
            )


def _other_settings(folder: Path, changes: list[str], *, way_out: str = WAY_OUT) -> str:
    return (
        f"{folder} holds a run with other settings:\n"
        + "\n".join(f"- {change}" for change in changes)
        + (WORLD_HINT if any(ROWS_PER_STEP in change for change in changes) else "")
        + "\nA resumed run must repeat them. "
        + way_out
    )


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is none, that is somebody else's, or that cannot be written; touch nothing."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"`output_dir` is `{folder}`, which is a file, but it must be a folder. Name another one."
        )
    try:
        names = os.listdir(folder) if folder.is_dir() else []
        place = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        if place == folder:
            with tempfile.TemporaryFile(dir=folder):  # where the system can, it never has a name
                pass
        elif not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            code = errno.ENOTDIR if not place.is_dir() else errno.EACCES
            raise OSError(code, os.strerror(code), str(place))
    except OSError as error:
        raise TrainingError(_cannot_be_written(folder, error)) from error
    strangers = [
        name for name in names if not name.startswith(".") and name not in ("lost+found", "previous")
    ]
    if strangers and not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"`output_dir` is `{folder}`, which holds other files ({', '.join(sorted(strangers)[:5])}), but "
            "a run needs a folder of its own. Name a new or empty one."
        )


def _cannot_be_written(folder: Path, error: OSError) -> str:
    return (
        f"`output_dir` is `{folder}`, but it cannot be written: {error}. "
        "Name a folder where you may write and that has space."
    )


def _results(folder: Path) -> dict[str, Any] | None:
    """Return what an earlier run left as its results; None where it left none.

    Raises:
        ConfigError: they are there, but nobody can tell whether that run is finished.
    """
    try:
        return read_results(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder / RESULTS_FILE} cannot be read ({error}), so whether this run is finished is not known."
            " Restore the file; or move it away, and training goes on from the newest checkpoint; or start "
            "anew with `resume=never` (the earlier run is kept in `previous/`)."
        ) from error


def _stored_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings that a run was made with; None where there are none.

    Raises:
        ConfigError: they are there, but cannot be read, and so not be compared.
    """
    path = folder / CONFIG_FILE
    try:
        stored = read_yaml(path)
        if not isinstance(stored, dict):
            raise ValueError("it holds no settings")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), so the settings of the run there cannot be compared with "
            "today's. Restore the file, or start anew with `resume=never` (the earlier run is kept in "
            "`previous/`)."
        ) from error
    data = stored.get("data")
    if isinstance(data, dict) and any(data.get(name) is None for name in LENGTHS):
        found = as_trained.trained_with(folder) or {}  # what the data told them to be
        stored["data"] = data | {name: found.get(name) for name in LENGTHS if data.get(name) is None}
    return stored


def _same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()
