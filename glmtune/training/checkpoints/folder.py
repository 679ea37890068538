"""Checkpoints that are either complete or not there: written aside, synced to disk, then renamed.

A run folder, and when each name appears:

    .checkpoint-20.partial/   while it is written; `repair` removes it after a kill
    checkpoint-20/            complete: every file is there as its checkpoint.json lists it, checksum included
    last/  best/              the tuned model of a checkpoint without what resuming needs, as hard links
    previous/1/               what was there before and is no longer: an earlier run that `resume=never` began
                              anew, checkpoints of later steps than the run went back to, damaged ones

Folders checkpoint-N of other tools may lie among them. They have neither our manifest nor loss_state.json,
and nothing here moves or deletes them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from glmtune.errors import CheckpointError, TrainingError
from glmtune.storage import files
from glmtune.storage.files import PARTIAL, REPLACED, partial_of
from glmtune.storage.lock import lock_folder
from glmtune.storage.manifest import MANIFEST, damage_of, facts_of, write_manifest
from glmtune.storage.manifest import read_manifest as parsed_manifest
from glmtune.storage.renames import rename
from glmtune.training.distributed.collectives import is_connection_lost

LOSS_STATE = "loss_state.json"
# Of a whole checkpoint: without one of them training would go on, but not as it would have gone on.
NEEDED = ("trainer_state.json", "scheduler.pt", LOSS_STATE)
OPTIMIZERS = ("optimizer.pt", "zero.json")
"""One of these holds, or lists, the optimizer's state."""
# What only resuming needs; everything else in a checkpoint is the tuned model.
STATE_FILES = frozenset(
    {
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "trainer_state.json",
        LOSS_STATE,
        "zero.json",
        MANIFEST,
    }
)
STATE_PREFIXES = ("rng_state", "zero-")
"""What the names begin with of files that each process writes for itself."""
# What a run folder holds besides checkpoint-N.
RUN_FILES = frozenset(
    {"last", "best", "runs", "config.yaml", "environment.json", "trainer_log.jsonl", "training_loss.png"}
    | {"all_results.json", "train_results.json", "eval_results.json", "README.md"}
    | {"retention", "retention.png"}
    | {"rollbacks.json", "changed_settings.json", "not_finite.json", "not_finite.damaged.json"}
    | {"preference"}
)
# torch.save turns a full disk into a RuntimeError of its zip writer, safetensors into an error of its own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class StagedCheckpoint:
    """A checkpoint on its way: a hidden folder that all processes fill, and that one of them seals.

    A context manager would say the same in one word, but must end in the thread and the block that began it,
    and a checkpoint written while training goes on begins in one thread and ends in another. So the three
    steps are methods: `begin`, then `seal`, or `discarded_on_error` around everything between the two.

    Attributes:
        final: its name from `seal` on; a folder of that name is replaced.
        manifest: plain values kept in the manifest, beside the list of files.
        is_owner: whether this process begins, seals and discards; for the others these steps do nothing.
    """

    final: Path
    manifest: Mapping[str, Any] = field(default_factory=dict)
    is_owner: bool = True

    @property
    def folder(self) -> Path:
        """Where files are written to, beside the final place."""
        return partial_of(self.final)

    def begin(self) -> None:
        """Make the folder, empty.

        Raises:
            TrainingError: it cannot be made.
        """
        if self.is_owner:
            with self.discarded_on_error():
                files.begin_folder(self.final)

    @contextmanager
    def discarded_on_error(self) -> Generator[None]:
        """Run a block that adds files; if it fails, nothing of the checkpoint is left.

        Raises:
            TrainingError: in the owner, what could not be written and what is still intact. Other processes
                raise what the block did; so does the owner after an error that is none of writing.
        """
        try:
            yield
        except BaseException as error:
            if not self.is_owner:
                raise
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, WRITE_ERRORS) and not is_connection_lost(error):
                raise TrainingError(write_problem(self.final, error)) from error
            raise

    def seal(self, known: Mapping[str, str] | None = None) -> None:
        """Give the folder its final name, once every byte of it is on disk.

        Args:
            known: checksums of files that were linked, not written.

        Raises:
            TrainingError: the disk does not take it, or the name is that of another tool's checkpoint;
                ``final`` is as it was.
        """
        if self.is_owner:
            with self.discarded_on_error():
                refuse_foreign(self.final)
                write_manifest(self.folder, self.manifest, known)  # last, as it lists the others
                files.put_in_place(self.folder, self.final)


@contextmanager
def writing(
    final: Path, *, manifest: Mapping[str, Any] | None = None, known: Mapping[str, str] | None = None
) -> Generator[Path]:
    """Yield a folder to fill; it takes the name ``final`` only when everything is on disk.

    Args:
        final: the folder to appear; one of that name is replaced.
        manifest: plain values kept in the manifest.
        known: see `StagedCheckpoint.seal`.

    Yields:
        An empty folder beside ``final``.

    Raises:
        TrainingError: a file could not be written (disk full, no permission, ...); ``final`` is as it was.
    """
    staged = StagedCheckpoint(final, manifest or {})
    staged.begin()
    with staged.discarded_on_error():
        yield staged.folder
    staged.seal(known)


def write_problem(path: Path, error: BaseException) -> str:
    """Word a failed write: what, why, what is still there, what to do."""
    newest = latest_checkpoint(path.parent)
    kept = f"{newest.name} is intact" if newest else "no checkpoint had been written yet"
    return (
        f"`{path}` could not be written: {error}. A run needs space and permission in `output_dir`; {kept}, "
        "so only the steps after it are lost. Free some space (or lower `trainer.save_total_limit`) and run "
        "the same command again: it goes on from there."
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the facts in a checkpoint's manifest, or None where the checkpoint is not complete.

    Contents are not looked at: `problem_of` does that once, before anything is loaded.

    Raises:
        CheckpointError: it cannot be read, so nobody knows whether it is complete.
    """
    try:
        manifest = parsed_manifest(folder)
        is_whole = manifest is not None and damage_of(folder, manifest, contents=False) is None
    except ValueError:
        return None
    except OSError as error:
        raise unreadable(folder, error) from error
    return facts_of(manifest) if manifest is not None and is_whole else None


def problem_of(folder: Path) -> str | None:
    """Say why a run cannot go on from a checkpoint, after reading all of it; None: it can.

    Raises:
        CheckpointError: something in it cannot be read.
    """
    try:
        manifest = parsed_manifest(folder)
        if manifest is None:
            return f"{MANIFEST} is missing"
        if (damage := damage_of(folder, manifest)) is not None:
            return damage
    except ValueError as error:
        return f"{MANIFEST} is damaged: {error}"
    except OSError as error:
        raise unreadable(folder, error) from error
    held = manifest["files"]
    if not any(name in held for name in OPTIMIZERS):
        return f"it holds no state of the optimizer ({' or '.join(OPTIMIZERS)})"
    return next((f"it holds no {name}" for name in NEEDED if name not in held), None)


def unreadable(place: Path, error: OSError) -> CheckpointError:
    """Word that something is there and cannot be read, which is not the same as its absence."""
    return CheckpointError(
        f"`{error.filename or place}` cannot be read ({error.strerror or error}), so what is there is not "
        "known, and nothing is changed. Make it readable, or move it out of the run folder yourself."
    )


def step_of(folder: Path) -> int | None:
    """Return N of a folder named ``checkpoint-N``, else None."""
    stem, _, number = folder.name.partition("-")
    return int(number) if stem == "checkpoint" and number.isascii() and number.isdecimal() else None


def is_ours(folder: Path) -> bool:
    """Tell whether a folder ``checkpoint-N`` was written by a run of glmtune, whole or not.

    Raises:
        CheckpointError: the folder cannot be looked into.
    """
    try:
        names = os.listdir(folder)
    except NotADirectoryError:
        return False
    except OSError as error:
        raise unreadable(folder, error) from error
    return MANIFEST in names or LOSS_STATE in names


def own_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder that are ours, whole or not, oldest first.

    Raises:
        CheckpointError: see `is_ours`.
    """
    found = [folder for folder in run.glob("checkpoint-*") if step_of(folder) is not None and is_ours(folder)]
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder that are known to be complete, oldest first."""
    found: list[Path] = []
    for folder in run.glob("checkpoint-*"):
        # One that cannot be read now is none to count on, nor one to remove.
        with suppress(CheckpointError):
            if step_of(folder) is not None and read_manifest(folder) is not None:
                found.append(folder)
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def latest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, if any."""
    return found[-1] if (found := checkpoints(run)) else None


@dataclass(frozen=True)
class Search:
    """What a run folder offers to go on from.

    Attributes:
        checkpoint: the newest that is whole, None if there is none.
        passed_over: newer ones of ours, each with what is wrong with it.
    """

    checkpoint: Path | None
    passed_over: Mapping[Path, str]


def newest_whole(run: Path) -> Search:
    """Find the newest checkpoint whose every byte is as it was written.

    Raises:
        CheckpointError: a newer one cannot be read.
    """
    passed_over: dict[Path, str] = {}
    for folder in reversed(own_checkpoints(run)):
        problem = problem_of(folder)
        if problem is None:
            return Search(folder, passed_over)
        passed_over[folder] = problem
    return Search(None, passed_over)


def checkpoint_at(path: Path) -> Path:
    """Return a checkpoint named by the user, if it is one and whole.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
    """
    problem = "there is no such folder" if not path.is_dir() else problem_of(path)
    if step_of(path) is None:
        problem = "its name is not checkpoint-N"
    if problem is not None:
        raise CheckpointError(
            f"`resume` is `{path}`, but that is no complete checkpoint: {problem}. Name another one, or use "
            "`resume=auto`: it takes the newest that is whole."
        )
    return path


def refuse_foreign_between(run: Path, step: int, max_steps: int) -> None:
    """Make sure, before training, that no checkpoint of another tool is where one of ours may be due.

    Raises:
        TrainingError: one is.
    """
    for folder in run.glob("checkpoint-*"):
        if step < (step_of(folder) or 0) <= max_steps:
            refuse_foreign(folder)


def refuse_foreign(final: Path) -> None:
    """Make sure that a checkpoint to be written replaces none of another tool.

    Raises:
        TrainingError: it would.
    """
    if step_of(final) is not None and os.path.lexists(final) and not is_ours(final):
        raise TrainingError(
            f"A checkpoint of step {step_of(final)} is due, but `{final}` is there already and was not "
            "written by glmtune. Move it elsewhere, or name another `output_dir`; the same command then goes "
            "on from the checkpoint before."
        )


def repair(run: Path) -> None:
    """Remove what a killed run left half-written, and put back a folder caught while being replaced.

    Whoever calls this holds the lock of the run folder, so no other run is at work on what a run writes. What
    other commands prepare there (an export into ``RUN/export``) is theirs, under locks of their own.
    """
    for leftover in _leftovers(run, REPLACED):
        original = run / leftover.name.removeprefix(".").removesuffix(REPLACED)
        if original.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            rename(leftover, original)
    for leftover in _leftovers(run, PARTIAL):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _leftovers(run: Path, suffix: str) -> list[Path]:
    """Return what lies in a run folder under such a hidden name for something that a run writes."""
    found = {path: run / path.name[1 : -len(suffix)] for path in run.glob(f".*{suffix}")}
    return [path for path, final in found.items() if final.name in RUN_FILES or step_of(final) is not None]


def remove_oldest(run: Path, *, keep: int | None) -> None:
    """Remove the oldest checkpoints until ``keep`` are left; None keeps all."""
    for folder in checkpoints(run)[: -keep if keep else 0]:
        shutil.rmtree(folder, ignore_errors=True)


def publish(
    checkpoint: Path, final: Path, *, manifest: Mapping[str, Any] | None = None, whole: bool = False
) -> None:
    """Offer the tuned model of a checkpoint under a fixed name (``last``, ``best``), without optimizer state.

    Files are hard links where the file system allows, so they take no space, and outlive the checkpoint.

    Args:
        checkpoint: a complete checkpoint.
        final: the folder to appear; one of that name is replaced.
        manifest: plain values kept in its manifest.
        whole: take the optimizer state along.

    Raises:
        TrainingError: see ``writing``.
    """
    known = (parsed_manifest(checkpoint) or {}).get("checksums", {})
    with writing(final, manifest=manifest, known=known) as folder:
        for path in sorted(checkpoint.rglob("*")):
            name = path.relative_to(checkpoint)
            is_state = name.parts[0] in STATE_FILES or name.name.startswith(STATE_PREFIXES)
            if path.is_dir() or name.name == MANIFEST or (is_state and not whole):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, folder / name)
            except OSError:
                shutil.copy2(path, folder / name)


def run_entries(run: Path) -> list[Path]:
    """Return everything in a run folder that belongs to its run, in the order in which it can be moved away.

    A kill between two moves must leave what still works: the results, which say that all is there, go first,
    the newest checkpoint with the log last but for the settings, which tell that this is a run folder.
    """
    own = own_checkpoints(run)
    others = [path for path in run.glob("*") if path.name in RUN_FILES or path.name.startswith("predict")]
    places = {"all_results.json": 0, "trainer_log.jsonl": 3, "rollbacks.json": 3, "config.yaml": 4}
    return sorted(
        [*own, *others], key=lambda path: (places.get(path.name, 2 - (path in own)), step_of(path) or 0)
    )


def set_aside(
    run: Path, paths: Iterable[Path] | None = None, *, copies: Iterable[Path] = (), label: str = ""
) -> Path | None:
    """Move what a run no longer goes on with into ``previous/N``, so that nothing is lost or mixed up.

    Args:
        run: the run folder.
        paths: what is moved; None: everything of the run. Those not there are passed over.
        copies: files that the run goes on with and that say what the moved ones were: kept there as well.
        label: put before the number, for what is less than a run.

    Returns:
        The folder it was moved to; None where there was nothing.

    Raises:
        ConfigError: another process is predicting into a folder in it.
    """
    found = [path for path in (run_entries(run) if paths is None else paths) if os.path.lexists(path)]
    kept = [path for path in copies if path.is_file()]
    if not found and not kept:
        return None
    for path in found:
        if path.name.startswith("predict") and path.is_dir():
            lock_folder(path).release()  # another command's, under a lock of its own
    names = [path.name.removeprefix(label) for path in (run / "previous").glob(f"{label}*")]
    target = (
        run / "previous" / f"{label}{max([int(name) for name in names if name.isdecimal()], default=0) + 1}"
    )
    target.mkdir(parents=True)
    for path in kept:
        shutil.copy2(path, target / path.name)
    for path in found:
        rename(path, target / path.name)
    return target
