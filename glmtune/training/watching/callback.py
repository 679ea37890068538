"""Watches a trainer: gathers the numbers of each step, asks the rules, reports on console and in the log."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.terminal.console import Console
from glmtune.training.log import append_entry
from glmtune.training.settings import WatchSettings
from glmtune.training.watching.rules import Alert, Step, StepWatch

KEPT = 50
"""Steps and alerts remembered as evidence: enough to see a loss drift before it breaks."""
# A sample, as comparing all weights would cost a copy of them and a pass over memory in every step.
WATCHED_TENSORS, WATCHED_NUMBERS = 16, 1024
"""Trained tensors looked at for movement, spread over the model, and how many numbers of each."""


class TrainingWatch(TrainerCallback):
    """The trainer tells it of batches and losses; everything else it sees as a callback.

    Attributes:
        settings: thresholds, and how often a run may go back.
        console: where alerts are printed.
        losses: step → loss, of the last steps.
        alerts: the last ones.
        batch_losses: of the current step's batches in this process, each its part of the step's loss.
        step_loss: of the current step, mean over all processes.
        num_labels: of the current step.
    """

    def __init__(self, settings: WatchSettings, run: Path) -> None:
        """Start with no history.

        Args:
            settings: thresholds.
            run: the run folder, whose log takes the alerts.
        """
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.losses: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self.alerts: deque[Alert] = deque(maxlen=KEPT)
        self.batch_losses: list[Tensor] = []
        self.step_loss = math.nan
        self.num_labels: int | None = None
        self.settings = settings
        self._run = run
        self._rules = StepWatch(settings)
        self._step = 0
        self._mark = self._wait_seconds = 0.0
        self._rate = 0.0
        self._sample: list[Tensor] = []

    # ---- what the trainer tells

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Time the wait for the batches of a step; say so while it lasts too long."""
        start, limit = time.monotonic(), self.settings.stall_seconds
        # A thread, as the training thread hangs in the very wait that is to be reported.
        alarm = threading.Timer(limit, self._stalled)
        alarm.daemon = True
        if limit:
            alarm.start()
        try:
            yield
        finally:
            alarm.cancel()
            self._wait_seconds += time.monotonic() - start

    def begin_step(self, num_labels: Tensor | int | None) -> None:
        """Forget the batches of the step before.

        Args:
            num_labels: in all batches of the new one.
        """
        self.batch_losses = []
        self.num_labels = None if num_labels is None else int(num_labels)

    def reduce_step(self, flags: Sequence[bool], mean: Callable[[Tensor], Tensor]) -> list[bool]:
        """Note the step's loss, and tell which flags are set in any process.

        One reduction for all, so that all processes stop at this step or none does: one that stopped alone
        would leave the others in the next collective.

        Args:
            flags: of this process.
            mean: over all processes. Each loss is scaled so that its mean is that over all labels, as their
                gradients are averaged; a flag set in one process is above 0 everywhere.
        """
        loss = torch.stack(self.batch_losses).sum().double()
        self.step_loss, *found = mean(torch.stack([loss, *torch.tensor(flags).to(loss)])).tolist()
        return [flag > 0 for flag in found]

    def report(self, alert: Alert) -> None:
        """Print an alert and add it to the log."""
        self.alerts.append(alert)
        self.console.print(f"! {alert.text}", markup=False)
        append_entry(self._run, alert.entry())

    # ---- what it sees itself

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, also after a rollback."""
        self._rules = StepWatch(self.settings)
        self._step = state.global_step
        self._mark = time.monotonic()
        self._sample = _sample(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rate of the step, before the scheduler changes it."""
        self._rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the step, and report what is new."""
        self._step = state.global_step
        self.losses.append((self._step, self.step_loss))
        before, self._sample = self._sample, _sample(kwargs["model"])
        moved = [not torch.equal(*pair) for pair in zip(before, self._sample, strict=True)]
        step = Step(
            number=self._step,
            loss=self.step_loss,
            num_labels=self.num_labels,
            learning_rate=self._rate,
            has_moved=any(moved) if moved else None,
            is_skipped=bool(getattr(kwargs["optimizer"], "step_was_skipped", False)),
            loss_scale=_loss_scale(kwargs["optimizer"]),
            wait_seconds=self._wait_seconds,
            seconds=time.monotonic() - self._mark,
        )
        self._mark, self._wait_seconds = time.monotonic(), 0.0
        alerts = self._rules.look(step)
        if state.is_world_process_zero:
            for alert in alerts:
                self.report(alert)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave evaluations and checkpoints out of the time of steps."""
        self._mark = time.monotonic()

    on_save = on_evaluate

    def _stalled(self) -> None:
        seconds = self.settings.stall_seconds
        text = (
            f"no batch for step {self._step + 1} came within {seconds:g} s. The data may lie on a slow or "
            "lost disk, or a worker process hangs: try `trainer.dataloader_num_workers=0`."
        )
        self.report(Alert("stalled_data", self._step, text, {"stall_seconds": seconds}))


def _loss_scale(optimizer: Any) -> float | None:
    """Return the loss scale of PyTorch's scaler, or of DeepSpeed's; None without one."""
    if (scaler := getattr(optimizer, "scaler", None)) is not None:
        return float(scaler.get_scale())
    scaler = getattr(getattr(optimizer, "optimizer", None), "loss_scaler", None)
    return None if scaler is None else float(scaler.cur_scale)


def _sample(model: nn.Module) -> list[Tensor]:
    """Copy some numbers of some trained weights, those that this process holds."""
    trained: list[Any] = [weight for weight in model.parameters() if weight.requires_grad]
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in trained]
    # Under ZeRO-3 (`ds_id`) a weight is whole or empty, as the last step left it: no two look alike.
    held: list[Tensor] = [weight for weight in local if weight.numel() and not hasattr(weight, "ds_id")]
    spread = held[:: max(1, len(held) // WATCHED_TENSORS)][:WATCHED_TENSORS]
    return [weight.detach().reshape(-1)[:WATCHED_NUMBERS].clone() for weight in spread]
