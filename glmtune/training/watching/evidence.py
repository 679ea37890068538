"""A loss or gradient that is not finite: what is known of it, and the error that says so.

It is found before the optimizer uses it, so the weights are good, and the run can go back to a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmtune.errors import TrainingError
from glmtune.retention.settings import RETAIN_FILE
from glmtune.training.distributed import collectives
from glmtune.training.watching.callback import TrainingWatch
from glmtune.training.watching.rules import Alert

NAMED_ROWS = 8
"""Rows named in a message; the evidence file has all."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a step that was not finite.

    Attributes:
        step: its number.
        what: ``loss`` or ``gradient norm``.
        learning_rate: of the step.
        grad_norm: before clipping; None where it was not formed.
        batch_losses: of its batches, each its part of the step's loss; process after process.
        rows: numbers of its rows in the training split (all processes), from 0.
        replayed: numbers of its general rows in ``retention/retain.jsonl``, from 0.
        losses: (step, loss) of the steps before.
        weights: names of trained weights whose gradient is not finite.
        alerts: lines of the log about what was noticed before.
        processes: ranks of those in which a batch's loss is not finite.
    """

    step: int
    what: str
    learning_rate: float
    grad_norm: float | None
    batch_losses: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)

    def describe(self) -> str:
        """Word the evidence in two sentences."""
        history = ", ".join(f"{loss:.4g}" for _, loss in self.losses[-5:]) or "none yet"
        batches = ", ".join(f"{loss:.4g}" for loss in self.batch_losses)
        replayed = f"; its general rows in `{RETAIN_FILE}`: {_named(self.replayed)}" if self.replayed else ""
        norm = "not formed" if self.grad_norm is None else f"{self.grad_norm:.4g}"
        return (
            f"The {self.what} of step {self.step} is not finite (learning rate {self.learning_rate:.3g}; "
            f"losses before: {history}; losses of its batches: {batches}; gradient norm: {norm}). Its rows "
            f"in the training data, counted from 0: {_named(self.rows)}{replayed}."
        )

    def alert(self) -> Alert:
        """Return the evidence as a line for console and log."""
        return Alert("not_finite", self.step, self.describe(), {"what": self.what})


def _named(rows: list[int]) -> str:
    more = "" if len(rows) <= NAMED_ROWS else f" and {len(rows) - NAMED_ROWS} more"
    return ", ".join(str(row) for row in rows[:NAMED_ROWS]) + more


class NotFiniteError(TrainingError):
    """A loss or gradient is not finite; the weights were not touched by it.

    Attributes:
        evidence: what is known.
    """

    anchor = "not-finite"

    def __init__(self, evidence: Evidence, newest: Path | None) -> None:
        """Word the message.

        Args:
            evidence: what is known.
            newest: the last complete checkpoint, if any.
        """
        self.evidence = evidence
        kept = (
            f"The last good checkpoint, {newest.name}, is intact." if newest else "No checkpoint was due yet."
        )
        super().__init__(
            f"{evidence.describe()} A step with it would destroy the weights, so training stopped. {kept} "
            "Try a smaller `trainer.learning_rate`, some `trainer.warmup_steps`, a smaller "
            "`trainer.max_grad_norm`, or `trainer.precision=bf16`; if it is always the same rows, "
            "look at them with `glmtune data`."
        )


def gather_evidence(
    what: str,
    *,
    step: int,
    learning_rate: float,
    grad_norm: float | None,
    rows: list[int],
    replayed: list[int],
    model: nn.Module,
    watch: TrainingWatch,
) -> Evidence:
    """Gather what is known of the current step; every process must call this.

    Args:
        what: ``loss`` or ``gradient norm``.
        step: its number, from 1.
        learning_rate: of the step.
        grad_norm: before clipping; None where it was not formed.
        rows: numbers of the step's rows in the training split, in all processes.
        replayed: numbers of its general rows likewise.
        model: with the gradients of the step, before the optimizer uses them.
        watch: has the losses of the step and of those before.
    """
    losses = collectives.all_gather([float(loss) for loss in watch.batch_losses])
    return Evidence(
        step=step,
        what=what,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        batch_losses=[loss for part in losses for loss in part],
        rows=rows,
        replayed=replayed,
        losses=list(watch.losses),
        weights=[
            name
            for name, weight in model.named_parameters()
            if weight.grad is not None and not bool(torch.isfinite(weight.grad).all())
        ],
        alerts=[alert.entry() for alert in watch.alerts],
        processes=[rank for rank, part in enumerate(losses) if not all(map(math.isfinite, part))],
    )
