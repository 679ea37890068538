"""A loss or gradient that is not finite: what is known of it, as an error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from glmtune.errors import TrainingError
from glmtune.training.checkpoints.folder import latest_checkpoint
from glmtune.training.distributed import collectives
from glmtune.training.watching.rules import Alert

if TYPE_CHECKING:
    from glmtune.training.trainer import GlmTrainer

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
    losses: list[tuple[int, float]] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)

    def describe(self) -> str:
        """Word the evidence in two sentences."""
        history = ", ".join(f"{loss:.4g}" for _, loss in self.losses[-5:]) or "none yet"
        batches = ", ".join(f"{loss:.4g}" for loss in self.batch_losses)
        more = "" if len(self.rows) <= NAMED_ROWS else f" and {len(self.rows) - NAMED_ROWS} more"
        rows = ", ".join(str(row) for row in self.rows[:NAMED_ROWS]) + more
        norm = "not formed" if self.grad_norm is None else f"{self.grad_norm:.4g}"
        return (
            f"The {self.what} of step {self.step} is not finite (learning rate {self.learning_rate:.3g}; "
            f"losses before: {history}; losses of its batches: {batches}; gradient norm: {norm}). Its rows "
            f"in the training data, counted from 0: {rows}."
        )


class NotFiniteError(TrainingError):
    """A loss or gradient is not finite; the weights were not touched by it.

    Attributes:
        evidence: what is known.
    """

    def __init__(self, evidence: Evidence, kept: str) -> None:
        """Word the message.

        Args:
            evidence: what is known.
            kept: one sentence on the last good checkpoint.
        """
        self.evidence = evidence
        super().__init__(
            f"{evidence.describe()} A step with it would destroy the weights, so training stopped. {kept} "
            "Try a smaller `trainer.learning_rate`, some `trainer.warmup_steps`, a smaller "
            "`trainer.max_grad_norm`, or `trainer.precision=bf16`; if it is always the same rows, "
            "look at them with `glmtune data`."
        )


def not_finite(trainer: GlmTrainer, what: str, norm: Any) -> NotFiniteError:
    """Gather the evidence on the current step, report it, and make the error to raise, in every process.

    Args:
        trainer: between the backward pass and the change of the weights.
        what: ``loss`` or ``gradient norm``.
        norm: of the gradients, before clipping.
    """
    losses = collectives.gathered([float(loss) for loss in trainer.watch.batch_losses])
    evidence = Evidence(
        step=trainer.state.global_step + 1,
        what=what,
        learning_rate=trainer._get_learning_rate(),
        grad_norm=None if norm is None else float(norm),
        batch_losses=[loss for part in losses for loss in part],
        rows=_rows_of_step(trainer),
        losses=list(trainer.watch.losses),
        weights=[
            name
            for name, weight in trainer.tuned.model.named_parameters()
            if weight.grad is not None and not bool(torch.isfinite(weight.grad).all())
        ],
        alerts=[alert.entry() for alert in trainer.watch.alerts],
        processes=[rank for rank, part in enumerate(losses) if not all(map(math.isfinite, part))],
    )
    if trainer.is_world_process_zero():
        trainer.watch.report(Alert("not_finite", evidence.step, evidence.describe(), {"what": what}))
    newest = latest_checkpoint(trainer.run_folder)
    kept = f"The last good checkpoint, {newest.name}, is intact." if newest else "No checkpoint was due yet."
    return NotFiniteError(evidence, kept)


def _rows_of_step(trainer: GlmTrainer) -> list[int]:
    """Return the numbers of the rows that the current step learns from, in all processes."""
    args = trainer.args
    per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    order = list(trainer._train_sampler)
    steps_per_epoch = max(1, -(-len(order) // per_step))
    start = trainer.state.global_step % steps_per_epoch * per_step
    rows = order[start : start + per_step]
    packs = getattr(trainer.train_dataset, "packs", None)
    return rows if packs is None else [sample for row in rows for sample in packs[row]]
