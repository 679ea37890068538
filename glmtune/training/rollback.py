"""After a loss that is not finite: back to the last good checkpoint, with a lower learning rate.

`glmtune.training.watching.rollback_log` keeps the record; this file drives the trainer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from glmtune.errors import StartAnewError, TrainingError
from glmtune.training.checkpoints.folder import newest_whole, set_aside, step_of
from glmtune.training.distributed.collectives import broadcast_from_main
from glmtune.training.trainer import GlmTrainer
from glmtune.training.watching.evidence import NotFiniteError
from glmtune.training.watching.rollback_log import (
    Rollback,
    append_item,
    read_rollbacks,
    rollbacks_at,
    write_rollbacks,
)
from glmtune.training.watching.rules import Alert

EVIDENCE_FILE = "not_finite.json"


def train_with_rollbacks(trainer: GlmTrainer, checkpoint: Path | None) -> None:
    """Train to the end; where loss or gradient are not finite, go back and lower the rate, as often as set.

    Args:
        trainer: ready.
        checkpoint: where to go on from, None starts at step 0.

    Raises:
        TrainingError: it was not finite once more than allowed, or before the first checkpoint.
        StartAnewError: the run went back, but weights are sharded by DeepSpeed or FSDP; processes started
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
    run, settings, step = trainer.run_folder, trainer.settings, error.evidence.step
    writes = trainer.is_world_process_zero()
    if writes:
        append_item(run / EVIDENCE_FILE, dataclasses.asdict(error.evidence))
    # Read by one process: it looks at every byte of the checkpoint that all are about to load.
    search = broadcast_from_main(lambda: newest_whole(run))
    checkpoint, before = search.checkpoint, read_rollbacks(run)
    done = len(rollbacks_at(run, settings.learning_rate))
    if checkpoint is None or done >= settings.max_rollbacks:
        tries = "" if not done else f" {done} rollback{'s' if done > 1 else ''} did not help."
        raise TrainingError(f"{error}{tries} Everything known is in {run / EVIDENCE_FILE}.") from error
    # Two barriers: all must have counted the rollbacks before one is added, and it must be there before any
    # process reads the rate of the checkpoint it goes back to.
    trainer.accelerator.wait_for_everyone()
    back = Rollback(step, step_of(checkpoint) or 0, settings.rollback_rate, settings.learning_rate)
    text = (
        f"going back from step {step} to {checkpoint.name}, with {back.rate:g} of the learning rate "
        f"(rollback {done + 1} of {settings.max_rollbacks})."
    )
    if writes:
        for folder, problem in search.passed_over.items():
            moved = set_aside(run, [folder])
            said = f"{problem} of {folder.name}, which is kept in {moved}"
            trainer.watch.report(Alert("damaged_checkpoint", back.checkpoint, said))
        write_rollbacks(run, [*before, back])
        trainer.watch.report(Alert("rollback", back.checkpoint, text, dataclasses.asdict(back)))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_sharded:
        raise StartAnewError(
            # Another `train` in these processes would shard what is sharded already.
            f"{error.evidence.describe()} Weights divided among processes cannot be replaced in place. The "
            f"same command starts anew, {text}"
        ) from error
    # transformers keeps an optimizer that is there; a new one takes the checkpoint's moments and rate over.
    trainer.forget_optimizer()
    return checkpoint
