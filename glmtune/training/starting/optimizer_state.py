"""What a checkpoint holds of optimizer and schedule, under the settings of today.

An optimizer's state is two things in one file: what it has learnt (moments, counts of steps), which a resumed
run goes on with, and what it was told (rate, betas, decay, ...), which is told anew by today's settings:

    optimizer.pt   state          per weight: exp_avg, exp_avg_sq, step     taken
                   param_groups   lr, betas, eps, weight_decay, fused ...   those of the new optimizer stay
    scheduler.pt   last_epoch     steps of the schedule gone                taken
                   base_lrs       the peak rate                             today's, lowered by rollbacks

So a run resumed with the same settings is the very same, and one with others (`resume=force`) uses them.
ZeRO's own files (`glmtune.training.distributed.zero_state`) hold what was learnt alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from glmtune.errors import CheckpointError
from glmtune.training.checkpoints.saving import OPTIMIZER_FILE
from glmtune.training.distributed import fsdp
from glmtune.training.watching.rollback_log import scale_rate

SCHEDULER_FILE = "scheduler.pt"


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, *, is_sharded: bool) -> None:
    """Load what an optimizer had learnt; every process must call this.

    Args:
        optimizer: new, of today's settings; mutated.
        folder: of a checkpoint.
        is_sharded: whether FSDP2 shards the weights.

    Raises:
        CheckpointError: the file is damaged, or of other weights or another optimizer.
    """
    try:
        # Mapped, not read, where a process keeps only its shards of each tensor.
        state = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=is_sharded)
        state["param_groups"] = [
            {**stored, **{name: value for name, value in today.items() if name != "params"}}
            for stored, today in zip(state["param_groups"], optimizer.param_groups, strict=True)
        ]
        if is_sharded:
            fsdp.shard_optimizer_state(optimizer, state)
        # Loaded with today's options, as they decide where the state belongs: a fused Adam keeps its count of
        # steps on the GPU, the plain one on the host.
        optimizer.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{folder / OPTIMIZER_FILE} cannot be loaded: {str(error).strip().splitlines()[0]}. It is "
            "damaged, or of other weights or another `trainer.optim`. Go on from an earlier checkpoint "
            "(`resume=RUN/checkpoint-N`), or begin a new run with these weights: `prefix_path=`, "
            "`adapter_path=` or `init_from=`, and another `output_dir`."
        ) from error


def load_schedule(schedule: Any, folder: Path, *, factor: float) -> None:
    """Go to a checkpoint's place in the schedule of today.

    Args:
        schedule: new, of today's settings; mutated, with the rates of its optimizer. accelerate may have
            wrapped it.
        folder: of the checkpoint.
        factor: what the rollbacks so far have multiplied the rate by.

    Raises:
        CheckpointError: the file is damaged.
    """
    inner = getattr(schedule, "scheduler", schedule)  # wrapped where DeepSpeed made the optimizer
    assert isinstance(inner, LambdaLR)  # as are all of SCHEDULERS
    try:
        state: Mapping[str, Any] = torch.load(folder / SCHEDULER_FILE, weights_only=True)
        inner.last_epoch, inner._step_count = int(state["last_epoch"]), int(state["_step_count"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / SCHEDULER_FILE} cannot be loaded: {str(error).strip().splitlines()[0]}. It is "
            "damaged. Go on from an earlier checkpoint: `resume=RUN/checkpoint-N`."
        ) from error
    scale_rate(inner, factor)
