"""After a loss that is not finite: back to the last good checkpoint, with a lower learning rate.

`rollbacks.json` in the run folder lists every rollback, so that a run killed after one goes on at the same
rate: a checkpoint holds the rate at which it was made, and the rollbacks to that very checkpoint come on top.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations import TensorBoardCallback

from glmtune.errors import StartAnewError, TrainingError
from glmtune.files import write_json
from glmtune.training.checkpoints.folder import latest_checkpoint, step_of
from glmtune.training.watching.evidence import NotFiniteError
from glmtune.training.watching.rules import Alert

if TYPE_CHECKING:
    from glmtune.training.trainer import GlmTrainer

ROLLBACKS_FILE = "rollbacks.json"
EVIDENCE_FILE = "not_finite.json"


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
        _write(run / ROLLBACKS_FILE, [dataclasses.asdict(rollback) for rollback in kept])


def rate_factor(run: Path, step: int) -> float:
    """Return what multiplies the rate stored in a checkpoint: the rollbacks to it."""
    return math.prod(rollback.rate for rollback in read_rollbacks(run) if rollback.checkpoint == step)


def scale_rate(scheduler: LambdaLR, factor: float) -> None:
    """Multiply the peak learning rate of a schedule, and take the rate of today's schedule at its place.

    That is another one than the checkpoint's where the number of steps was changed, or the warm-up.

    Args:
        scheduler: mutated, with its optimizer.
        factor: 1 leaves the peak as it is, to the last bit.
    """
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    places = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, shape in places:
        group["initial_lr"], group["lr"] = base, base * shape(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def train_with_rollbacks(trainer: GlmTrainer, checkpoint: Path | None) -> None:
    """Train to the end; where loss or gradient are not finite, go back and lower the rate, as often as set.

    Args:
        trainer: ready.
        checkpoint: where to go on from, None starts at step 0.

    Raises:
        TrainingError: it was not finite once more than allowed, or before the first checkpoint.
        StartAnewError: the run went back, but weights are divided by DeepSpeed or FSDP; processes started
            anew, as our launcher does, go on at the lower rate.
    """
    while True:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except NotFiniteError as error:
            checkpoint = _go_back(trainer, error)
        else:
            return


def _go_back(trainer: GlmTrainer, error: NotFiniteError) -> Path:
    run, settings, step = trainer.run_folder, trainer.watch.settings, error.evidence.step
    writes = trainer.is_world_process_zero()
    if writes:
        _add(run / EVIDENCE_FILE, dataclasses.asdict(error.evidence))
    checkpoint, done = latest_checkpoint(run), len(read_rollbacks(run))
    if checkpoint is None or done >= settings.max_rollbacks:
        tries = "" if not done else f" {done} rollback{'s' if done > 1 else ''} did not help."
        raise TrainingError(f"{error}{tries} Everything known is in {run / EVIDENCE_FILE}.") from error
    trainer.accelerator.wait_for_everyone()  # all have read how often the run went back
    back = Rollback(step, step_of(checkpoint) or 0, settings.rollback_rate)
    text = (
        f"going back from step {step} to {checkpoint.name}, with {back.rate:g} of the learning rate "
        f"(rollback {done + 1} of {settings.max_rollbacks})."
    )
    if writes:
        _add(run / ROLLBACKS_FILE, dataclasses.asdict(back))
        trainer.watch.report(Alert("rollback", back.checkpoint, text, dataclasses.asdict(back)))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_deepspeed_enabled or trainer.divides:
        raise StartAnewError(
            f"{error.evidence.describe()} Weights divided among processes cannot be replaced in place. The "
            f"same command starts anew, {text}"
        ) from error
    trainer.forget_optimizer()
    if (board := trainer.pop_callback(TensorBoardCallback)) is not None:
        trainer.add_callback(_rewound(board, run, back.checkpoint))
    return checkpoint


def _rewound(board: Any, run: Path, step: int) -> TensorBoardCallback:
    """Close TensorBoard's file and open one that takes the later steps back."""
    from torch.utils.tensorboard import SummaryWriter

    if board.tb_writer is not None:
        board.tb_writer.close()
    return TensorBoardCallback(SummaryWriter(str(run / "runs"), purge_step=step + 1))


def _add(path: Path, values: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = []
    _write(path, [*found, values])


def _write(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    write_json(path, list(items))
