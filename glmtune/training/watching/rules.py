"""What goes wrong in a run without stopping it: rules that look at every step and say so at once."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glmtune.training.settings import WatchSettings

HISTORY = 50
"""Steps whose losses and times are remembered."""
ENOUGH = 20
"""Steps needed before a loss can be called unusual, or data loading slow."""
NOISE_FRAC = 0.02
"""A loss is taken to vary by this share of its median at least, however calm it has been."""
DEAD_STEPS = 3
"""Steps in a row without effect make a dead learning rate; the first step of a warm-up is one such."""
SLOW_SECONDS = 5.0
"""Waiting for data matters from so many seconds in `ENOUGH` steps on."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, as it went.

    Attributes:
        number: counted from 1.
        loss: mean over the labels of the step, nats.
        num_labels: labels of all its batches; None: not counted.
        learning_rate: used in the step.
        has_moved: whether any of the weights looked at changed; None: none could be looked at.
        is_skipped: the loss scaler found a gradient that was not finite, and left the weights alone.
        loss_scale: of the scaler, after the step; None without one.
        wait_seconds: spent waiting for its batches.
        seconds: spent in all.
    """

    number: int
    loss: float
    num_labels: int | None = None
    learning_rate: float = 1.0
    has_moved: bool | None = None
    is_skipped: bool = False
    loss_scale: float | None = None
    wait_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Alert:
    """Something a reader of the run should know now.

    Attributes:
        kind: one of `KINDS`, or of those that a trainer adds: ``not_finite``, ``rollback``, ``stalled_data``.
        step: during or after which it happened.
        text: what happened and what may be done.
        values: the numbers behind it, for ``trainer_log.jsonl``.
    """

    kind: str
    step: int
    text: str
    values: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """Return the line for ``trainer_log.jsonl``."""
        return {"step": self.step, "alert": self.kind, "text": self.text, **self.values}


class StepWatch:
    """Looks at every step; a condition that lasts is reported once, when it begins."""

    def __init__(self, settings: WatchSettings) -> None:
        """Start with no history.

        Args:
            settings: thresholds.
        """
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._times: deque[tuple[float, float]] = deque(maxlen=ENOUGH)
        self._without_effect = 0
        self._active: set[str] = set()

    def look(self, step: Step) -> list[Alert]:
        """Return what is new with this step.

        Args:
            step: the one just done; steps come in order.
        """
        found = {kind: rule(self, step) for kind, rule in KINDS.items()}
        new = [alert for kind, alert in found.items() if alert is not None and kind not in self._active]
        self._active = {kind for kind, alert in found.items() if alert is not None}
        return new


def _skipped(watch: StepWatch, step: Step) -> Alert | None:
    if not step.is_skipped:
        return None
    text = (
        f"step {step.number} was skipped: a gradient was not finite in fp16. The loss scale is now "
        f"{step.loss_scale:.6g}. Some skips at the start are usual; if they go on, use "
        "`trainer.precision=bf16`."
    )
    return Alert("skipped_step", step.number, text, {"loss_scale": step.loss_scale})


def _no_labels(watch: StepWatch, step: Step) -> Alert | None:
    if step.num_labels != 0:
        return None
    text = (
        f"step {step.number} has no label: every token of its rows is masked, so nothing is learnt. Look at "
        "its rows with `glmtune data`, at `data.loss_on`, and whether answers are cut off by "
        "`data.max_source_length` or `data.max_target_length`."
    )
    return Alert("no_labels", step.number, text)


def _zero_loss(watch: StepWatch, step: Step) -> Alert | None:
    if step.loss != 0.0 or step.num_labels == 0:
        return None
    labels = "its labels" if step.num_labels is None else f"{step.num_labels} labels"
    text = (
        f"the loss of step {step.number} is exactly 0 over {labels}, which no model reaches by learning: "
        "fp16 overflows, or the labels are wrong. Use `trainer.precision=bf16` (or fp32), and look at the "
        "rows with `glmtune data`."
    )
    return Alert("zero_loss", step.number, text, {"labels": step.num_labels})


def _spike(watch: StepWatch, step: Step) -> Alert | None:
    losses, limit = watch._losses, watch._settings.spike_deviations
    median = statistics.median(losses) if losses else 0.0
    # Median and median absolute deviation: one earlier spike moves neither. 1.4826 makes the latter a
    # standard deviation where losses are normally distributed.
    spread = 1.4826 * statistics.median([abs(loss - median) for loss in losses]) if losses else 0.0
    deviations = (step.loss - median) / max(spread, NOISE_FRAC * median, 1e-8)
    is_judged = len(losses) >= ENOUGH and limit > 0
    # A spike joins the history as well: a loss that stays up is a new level, not a spike in every step.
    losses.append(step.loss)
    if not is_judged or deviations <= limit:
        return None
    text = (
        f"the loss of step {step.number} is {step.loss:.4g}, {deviations:.0f} deviations above the median "
        f"{median:.4g} of the steps before. If it does not come back, lower `trainer.learning_rate` or "
        "`trainer.max_grad_norm`."
    )
    return Alert("loss_spike", step.number, text, {"step_loss": step.loss, "median_loss": median})


def _dead_rate(watch: StepWatch, step: Step) -> Alert | None:
    is_idle = step.is_skipped or step.loss == 0.0  # reported otherwise
    has_no_effect = not is_idle and (step.learning_rate == 0.0 or step.has_moved is False)
    watch._without_effect = watch._without_effect + 1 if has_no_effect else 0
    if watch._without_effect < DEAD_STEPS:
        return None
    why = (
        "the learning rate is 0"
        if step.learning_rate == 0.0
        else f"at a learning rate of {step.learning_rate:.3g} no weight looked at changed"
    )
    text = (
        f"nothing was learnt in the {DEAD_STEPS} steps up to {step.number}: {why}. Raise "
        "`trainer.learning_rate`, or check `trainer.lr_scheduler_type` and `trainer.warmup_steps`."
    )
    return Alert("dead_rate", step.number, text, {"learning_rate": step.learning_rate})


def _slow_data(watch: StepWatch, step: Step) -> Alert | None:
    watch._times.append((step.wait_seconds, step.seconds))
    waited, total = (sum(column) for column in zip(*watch._times, strict=True))
    if len(watch._times) < ENOUGH or waited < SLOW_SECONDS or waited < 0.5 * total:
        return None
    share = f"{waited / total:.0%}".replace("%", " %")
    text = (
        f"data loading takes {share} of the time of the {ENOUGH} steps up to {step.number}. Raise "
        "`trainer.dataloader_num_workers`, or put the data on a faster disk."
    )
    return Alert("slow_data", step.number, text, {"wait_seconds": round(waited, 3)})


KINDS: dict[str, Callable[[StepWatch, Step], Alert | None]] = {
    "skipped_step": _skipped,
    "no_labels": _no_labels,
    "zero_loss": _zero_loss,
    "loss_spike": _spike,
    "dead_rate": _dead_rate,
    "slow_data": _slow_data,
}
"""Kinds of alerts, in the order of their reports, and the rule of each."""
