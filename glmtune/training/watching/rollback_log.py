"""The record of a run's rollbacks, and what it says about the learning rate.

`rollbacks.json` in the run folder lists every rollback, so that a run killed after one goes on at the same
rate: a checkpoint holds the rate at which it was made, and the rollbacks to that very checkpoint come on top.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from glmtune.files import write_json

ROLLBACKS_FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """One time that a run went back.

    Attributes:
        failed_step: whose loss or gradient was not finite.
        checkpoint: the step gone back to.
        rate: what the learning rate was multiplied by.
    """

    failed_step: int
    checkpoint: int
    rate: float


def read_rollbacks(run: Path) -> list[Rollback]:
    """Return the rollbacks of a run, oldest first."""
    try:
        text = (run / ROLLBACKS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [Rollback(**values) for values in json.loads(text)]


def keep_rollbacks(run: Path, step: int) -> None:
    """Forget the rollbacks that a run going on from an earlier step has not seen yet.

    Args:
        run: the run folder.
        step: of the checkpoint gone on from; 0 for a run that begins.
    """
    found = read_rollbacks(run)
    kept = [rollback for rollback in found if rollback.checkpoint <= step and step > 0]
    if len(kept) < len(found):
        write_json(run / ROLLBACKS_FILE, [dataclasses.asdict(rollback) for rollback in kept])


def rate_factor(run: Path, step: int) -> float:
    """Return what multiplies the rate stored in a checkpoint: the rollbacks to it."""
    return math.prod(rollback.rate for rollback in read_rollbacks(run) if rollback.checkpoint == step)


def scale_rate(scheduler: LambdaLR, factor: float) -> None:
    """Multiply the peak learning rate of a schedule, and take the rate of today's schedule at its place.

    That is another one than the checkpoint's where the number of steps was changed, or the warm-up.

    Args:
        scheduler: mutated, with its optimizer; its state is that of a checkpoint.
        factor: 1 leaves the peak as it is, to the last bit.
    """
    # `initial_lr` of the groups stays: LambdaLR (torch 2.13) reads it once, to make `base_lrs` of it.
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    places = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, shape in places:
        group["lr"] = base * shape(
            scheduler.last_epoch
        )  # the schedule itself writes it only in its next step
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def append_item(path: Path, values: Mapping[str, Any]) -> None:
    """Add an item to a JSON file that holds a list, and make the file if it is not there.

    The whole file is written anew, so that a kill leaves the old list or the new one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = []
    write_json(path, [*found, values])
