"""The record of a run's rollbacks, and what it says about the learning rate.

`rollbacks.json` in the run folder lists every rollback, so that a run killed after one goes on at the same
rate: that of the settings, times the factors of all rollbacks so far. A learning rate that a user sets on the
way (`resume=force`) is used as it was given: the rollbacks before it were those of another rate.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from glmtune.errors import CheckpointError
from glmtune.storage.checksums import checked_json, json_with_checksum
from glmtune.storage.files import write_json
from glmtune.storage.renames import replace

ROLLBACKS_FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """One time that a run went back.

    Attributes:
        failed_step: whose loss or gradient was not finite.
        checkpoint: the step gone back to.
        rate: what the learning rate was multiplied by.
        learning_rate: the setting at that time; None in records of older versions: today's.
    """

    failed_step: int
    checkpoint: int
    rate: float
    learning_rate: float | None = None


def read_rollbacks(run: Path) -> list[Rollback]:
    """Return the rollbacks of a run, oldest first.

    Raises:
        CheckpointError: the record is damaged or cannot be read. It is part of the learning rate, so a run
            cannot go on without it.
    """
    path = run / ROLLBACKS_FILE
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        return [_rollback(checked_json(json.dumps(values))) for values in items]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), but it decides the learning rate that this run goes on with. "
            "Restore the file, or start anew with `resume=never` (the earlier run is kept in `previous/`)."
        ) from error


def _rollback(values: dict[str, Any]) -> Rollback:
    if not all(isinstance(value, int | float | None) for value in values.values()):
        raise ValueError("it holds something that is no number")
    return Rollback(**values)


def write_rollbacks(run: Path, rollbacks: Sequence[Rollback]) -> None:
    """Record the rollbacks of a run, each with its checksum; no file for none.

    Raises:
        OSError: the disk is full; the old record is kept.
    """
    path = run / ROLLBACKS_FILE
    if rollbacks or path.exists():
        write_json(path, [json_with_checksum(dataclasses.asdict(rollback)) for rollback in rollbacks])


def keep_rollbacks(run: Path, step: int) -> None:
    """Forget the rollbacks that a run going on from an earlier step has not seen yet.

    Args:
        run: the run folder.
        step: of the checkpoint gone on from; 0 for a run that begins.
    """
    found = read_rollbacks(run)
    kept = [rollback for rollback in found if rollback.checkpoint <= step and step > 0]
    if len(kept) < len(found):
        write_rollbacks(run, kept)


def rollbacks_at(run: Path, learning_rate: float) -> list[Rollback]:
    """Return the rollbacks of a run under a learning rate, oldest first.

    Args:
        run: the run folder.
        learning_rate: the setting.
    """
    return [found for found in read_rollbacks(run) if found.learning_rate in (None, learning_rate)]


def rate_factor(run: Path, step: int, learning_rate: float) -> float:
    """Return what multiplies the learning rate of the settings after a checkpoint: the rollbacks up to it.

    Args:
        run: the run folder that the checkpoint lies in.
        step: of the checkpoint.
        learning_rate: the setting.
    """
    found = rollbacks_at(run, learning_rate)
    return math.prod(rollback.rate for rollback in found if rollback.checkpoint <= step)


def scale_rate(scheduler: LambdaLR, factor: float) -> None:
    """Multiply the peak learning rate of a schedule, and take the rate of today's schedule at its place.

    Args:
        scheduler: mutated, with its optimizer; at the step of a checkpoint.
        factor: 1 leaves the peak as it is, to the last bit.
    """
    # `initial_lr` of the groups stays: LambdaLR (torch 2.13) reads it once, to make `base_lrs` of it.
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    places = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, shape in places:
        # The schedule itself writes it only in its next step.
        group["lr"] = base * shape(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def append_item(path: Path, values: Mapping[str, Any]) -> None:
    """Add an item to a JSON file that holds a list, and make the file if it is not there.

    The whole file is written anew, so that a kill leaves the old list or the new one. One that cannot be read
    is kept under another name.
    """
    found: list[Any] = []
    try:
        found = [*json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        pass
    except (ValueError, TypeError):
        replace(path, path.with_suffix(f".damaged{path.suffix}"))
    write_json(path, [*found, values])
