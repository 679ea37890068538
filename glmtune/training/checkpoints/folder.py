"""Checkpoints that are either complete or not there: written aside, synced to disk, then renamed.

A run folder, and when each name appears:

    .checkpoint-20.partial/   while it is written; `repair` removes it after a kill
    checkpoint-20/            complete: every file is there in the size that its checkpoint.json lists
    last/  best/              the tuned model of a checkpoint without what resuming needs, as hard links
    previous/1/               an earlier run that `resume=never` moved away
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from glmtune import files
from glmtune.errors import CheckpointError, TrainingError
from glmtune.files import PARTIAL, REPLACED, partial_of, write_json
from glmtune.training.distributed.collectives import is_connection_lost

MANIFEST = "checkpoint.json"
# What only resuming needs; everything else in a checkpoint is the tuned model.
STATE_FILES = frozenset(
    {
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "loss_state.json",
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
    | {"rollbacks.json", "not_finite.json"}
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

    def seal(self) -> None:
        """Give the folder its final name, once every byte of it is on disk.

        Raises:
            TrainingError: the disk does not take it; ``final`` is as it was.
        """
        if self.is_owner:
            with self.discarded_on_error():
                _write_manifest(self.folder, self.manifest)  # last, as it lists the others with their sizes
                files.put_in_place(self.folder, self.final)


@contextmanager
def writing(final: Path, *, manifest: Mapping[str, Any] | None = None) -> Generator[Path]:
    """Yield a folder to fill; it takes the name ``final`` only when everything is on disk.

    Args:
        final: the folder to appear; one of that name is replaced.
        manifest: plain values kept in the manifest.

    Yields:
        An empty folder beside ``final``.

    Raises:
        TrainingError: a file could not be written (disk full, no permission, ...); ``final`` is as it was.
    """
    staged = StagedCheckpoint(final, manifest or {})
    staged.begin()
    with staged.discarded_on_error():
        yield staged.folder
    staged.seal()


def _write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """List every file with its size, so that a checkpoint that lost one is no checkpoint."""
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"files": sizes, **values})


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
    """Return a checkpoint's manifest, or None where the checkpoint is not complete."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return manifest if whole else None


def step_of(folder: Path) -> int | None:
    """Return N of a folder named ``checkpoint-N``, else None."""
    stem, _, number = folder.name.partition("-")
    return int(number) if stem == "checkpoint" and number.isdigit() else None


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, oldest first."""
    found = [
        folder for folder in run.glob("checkpoint-*") if step_of(folder) is not None and read_manifest(folder)
    ]
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def latest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, if any."""
    return found[-1] if (found := checkpoints(run)) else None


def checkpoint_at(path: Path) -> Path:
    """Return a checkpoint named by the user, if it is one and complete.

    Raises:
        CheckpointError: the folder is missing or incomplete.
    """
    if read_manifest(path) is None or step_of(path) is None:
        raise CheckpointError(
            f"`resume` is `{path}`, but that is no complete checkpoint (a folder checkpoint-N with every "
            f"file that its {MANIFEST} lists). Name another one, or use `resume=auto`: it takes the newest."
        )
    return path


def repair(run: Path) -> None:
    """Remove what a killed run left half-written, and put back a folder caught while being replaced."""
    for leftover in run.glob(f".*{REPLACED}"):
        original = run / leftover.name.removeprefix(".").removesuffix(REPLACED)
        if original.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.rename(original)
    for leftover in run.glob(f".*{PARTIAL}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def drop_after(run: Path, step: int) -> None:
    """Remove checkpoints of later steps than the one a run goes on from; they would be written again."""
    for folder in run.glob("checkpoint-*"):
        number = step_of(folder)
        if number is not None and (number > step or read_manifest(folder) is None):
            shutil.rmtree(folder)


def remove_oldest(run: Path, *, keep: int | None) -> None:
    """Remove the oldest checkpoints until ``keep`` are left; None keeps all."""
    for folder in checkpoints(run)[: -keep if keep else 0]:
        shutil.rmtree(folder, ignore_errors=True)


def publish(checkpoint: Path, final: Path, *, manifest: Mapping[str, Any] | None = None) -> None:
    """Offer the tuned model of a checkpoint under a fixed name (``last``, ``best``), without optimizer state.

    Files are hard links where the file system allows, so they take no space, and outlive the checkpoint.

    Args:
        checkpoint: a complete checkpoint.
        final: the folder to appear; one of that name is replaced.
        manifest: plain values kept in its manifest.

    Raises:
        TrainingError: see ``writing``.
    """
    with writing(final, manifest=manifest) as folder:
        for path in sorted(checkpoint.rglob("*")):
            name = path.relative_to(checkpoint)
            if path.is_dir() or name.parts[0] in STATE_FILES or name.name.startswith(STATE_PREFIXES):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, folder / name)
            except OSError:
                shutil.copy2(path, folder / name)


def set_aside(run: Path) -> Path | None:
    """Move everything of an earlier run into ``previous/N``, so that nothing of it is lost or mixed up.

    Returns:
        The folder it was moved to; None where there was nothing.
    """
    found = [
        path
        for path in run.glob("*")
        if path.name in RUN_FILES or path.name.startswith("predict") or step_of(path) is not None
    ]
    if not found:
        return None
    taken = [int(path.name) for path in (run / "previous").glob("*") if path.name.isdigit()]
    target = run / "previous" / str(max(taken, default=0) + 1)
    target.mkdir(parents=True)
    for path in found:
        path.rename(target / path.name)
    return target
