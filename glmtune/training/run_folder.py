"""The folder of one run: is it new, does it hold a run to go on with, is that run already finished?

A resumed run must end with the very numbers of one that was never stopped, so every setting that decides them
has to be as it was; `changed_settings` compares today's with config.yaml, and knows which ones are free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from glmtune.errors import ConfigError, TrainingError
from glmtune.files import write_text
from glmtune.training.checkpoints.folder import (
    checkpoint_at,
    drop_after,
    latest_checkpoint,
    read_manifest,
    repair,
    set_aside,
    step_of,
)
from glmtune.training.watching.rollback_log import keep_rollbacks

CONFIG_FILE = "config.yaml"
RESULTS_FILE = "all_results.json"
# Settings that a run may change on its way: they decide neither the numbers nor their order. Where the model
# and the data lie may change too, because their fingerprints are compared instead.
FREE = frozenset(
    {"output_dir", "resume", "model.source", "model.device", "model.family"}
    | {"data.name", "data.dir", "data.train_file", "data.test_file", "data.max_predict_samples"}
    | {f"trainer.{name}" for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit")}
    | {f"trainer.{name}" for name in ("early_stopping_patience", "report_to", "per_device_eval_batch_size")}
    | {f"trainer.{name}" for name in ("max_rollbacks", "rollback_rate", "spike_deviations", "stall_seconds")}
    | {f"trainer.{name}" for name in ("dataloader_num_workers", "num_threads", "gradient_checkpointing")}
    | {"trainer.async_save"}
)

PLACES = ("launch", "deepspeed", "distributed", "plan")
"""Groups that say where a run computes and keeps its numbers, which may change too: checkpoints hold whole
tensors, and rows keep their order, so the numbers change in their last digits only."""
WORLD_HINT = (
    "\n(That is `launch.num_processes` on all machines × `trainer.per_device_train_batch_size` × "
    "`trainer.gradient_accumulation_steps`: with another number of processes, change the others so that the "
    "product stays.)"
)
# Rows per optimizer step = processes x rows per device x accumulation steps: only the product counts.
ROW_FACTORS = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")


@dataclass(frozen=True)
class RunStart:
    """How a run begins.

    Attributes:
        folder: the run folder; it exists.
        checkpoint: where to go on from; None starts at step 0.
        finished: results of a run that is already complete in this folder, else None.
        set_aside: where an earlier run was moved to, if one was.
    """

    folder: Path
    checkpoint: Path | None = None
    finished: dict[str, Any] | None = None
    set_aside: Path | None = None


def start_run(output_dir: str, *, resume: str, settings: Mapping[str, Any]) -> RunStart:
    """Prepare the run folder and decide where training starts.

    Args:
        output_dir: the run folder, created if absent.
        resume: ``auto``: go on from the newest complete checkpoint, if there is one; ``never``: start anew
            and move an earlier run into ``previous/N``; ``force``: like auto, whatever settings changed; else
            the path of a checkpoint.
        settings: all settings of the run, nested plain values; written to ``config.yaml``.

    Raises:
        ConfigError: the folder is a file or holds other things, or settings that matter have changed.
        CheckpointError: ``resume`` names no complete checkpoint.
        TrainingError: the folder cannot be written.
    """
    folder = _writable_folder(Path(output_dir).expanduser())
    moved = set_aside(folder) if resume == "never" else None
    repair(folder)  # before anything is looked for: a kill may have left `last` under its second name
    results = _finished(folder)
    stored = _stored_settings(folder)
    if stored is not None and resume not in ("force", "never") and (results or latest_checkpoint(folder)):
        _refuse_changes(stored, settings, folder)
    if results is not None and resume == "auto":
        return RunStart(folder, finished=results)
    if resume in ("auto", "force"):
        checkpoint = latest_checkpoint(folder)
    else:
        checkpoint = None if resume == "never" else checkpoint_at(Path(resume))
    # Everything of later steps goes, as it will be made again, and half of both would be neither run.
    if checkpoint is not None:
        drop_after(folder, step_of(checkpoint) or 0)
    keep_rollbacks(folder, step_of(checkpoint) or 0 if checkpoint else 0)
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    write_text(folder / CONFIG_FILE, yaml.safe_dump(dict(settings), allow_unicode=True, sort_keys=False))
    return RunStart(folder, checkpoint, set_aside=moved)


def check_fingerprints(checkpoint: Path, fingerprints: Mapping[str, str]) -> None:
    """Make sure that a checkpoint was made with the same model and data.

    Args:
        checkpoint: a complete checkpoint.
        fingerprints: of today, by name.

    Raises:
        ConfigError: one of them differs.
    """
    manifest = read_manifest(checkpoint) or {}
    for name, value in fingerprints.items():
        before = manifest.get(name, value)  # a checkpoint from before there was this fingerprint passes
        if before != value:
            raise ConfigError(
                f"{checkpoint} was made with another {name.replace('_', ' ')}: {before} then, {value} now. A "
                "run can only go on with what it began with. Restore it, or start anew with `resume=never`, "
                "or name another `output_dir`."
            )


def changed_settings(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """List the settings that matter and differ, each as ``path: before -> now``.

    A setting that the version of then did not know was off then.
    """
    before, now = _comparable(stored), _comparable(settings)
    new = [path for path, value in now.items() if path not in before and not value]
    paths = [
        path
        for path in {**before, **now}
        if path not in FREE and path not in new and before.get(path) != now.get(path)
    ]
    return [f"`{path}`: {before.get(path)} then, {now.get(path)} now" for path in paths]


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings flat; how a step's rows are shared out does not count, only how many they are."""
    flat = {path: value for path, value in _leaves(settings) if not path.startswith(PLACES)}
    launch = settings.get("launch") or {}
    parts = [launch.get("num_processes") or 1, *(flat.pop(path, None) or 1 for path in ROW_FACTORS)]
    return {**flat, "rows per optimizer step": math.prod(parts)}


def _refuse_changes(stored: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    changes = changed_settings(stored, settings)
    if changes:
        raise ConfigError(
            f"{folder} holds a run with other settings:\n"
            + "\n".join(f"- {change}" for change in changes)
            + (WORLD_HINT if any("rows per" in change for change in changes) else "")
            + "\nA resumed run must repeat them. Name another `output_dir`, start anew with `resume=never` "
            "(the earlier run is kept in `previous/`), or go on regardless with `resume=force`."
        )


def _writable_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"`output_dir` is `{folder}`, which is a file, but it must be a folder. Name another one."
        )
    strangers = [
        path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if not path.name.startswith(".") and path.name not in ("lost+found", "previous")
    ]
    if strangers and not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"`output_dir` is `{folder}`, which holds other files ({', '.join(sorted(strangers)[:5])}), but "
            "a run needs a folder of its own. Name a new or empty one."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise TrainingError(
            f"`output_dir` is `{folder}`, but it cannot be written: {error}. "
            "Name a folder where you may write and that has space."
        ) from error
    return folder


def _finished(folder: Path) -> dict[str, Any] | None:
    try:
        results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) and results.get("finished") else None


def _stored_settings(folder: Path) -> dict[str, Any] | None:
    try:
        stored = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return stored if isinstance(stored, dict) else None


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
