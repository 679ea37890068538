"""Callbacks of a run: its flow, the log file, the progress display, stopping on signals.

transformers calls them in the order in which they were added; what a trainer looks for in a run (losses that
jump, slow data) is `glmtune.training.watching`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.memory import peak_bytes
from glmtune.signals import leave_closed_terminal, stopping_signals
from glmtune.terminal.console import Console
from glmtune.terminal.progress import Meter, error_console, short_number, short_time
from glmtune.training.log import append_entry, read_log, sets_of, write_log


class Flow(TrainerCallback):
    """What transformers' own flow leaves out.

    Tells the order of rows its epoch (transformers tells samplers of its own only), also in the middle of a
    resumed one; lets the trainer begin; logs the last step, whatever ``logging_steps`` is.
    """

    def __init__(self, *, begin: Callable[[], None], set_epoch: Callable[[int], None]) -> None:
        """Keep what is called.

        Args:
            begin: when everything is ready and restored, before the first step.
            set_epoch: with the number of the epoch that begins, from 0.
        """
        self._begin = begin
        self._set_epoch = set_epoch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the trainer begin."""
        self._begin()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the order of the epoch."""
        self._set_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the last step logged."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class TrainingLog(TrainerCallback):
    """Appends to ``trainer_log.jsonl``: one line per ``logging_steps`` and one per evaluation.

    A resumed run first drops the lines of steps that it is about to repeat. Speeds count real tokens (no
    padding) and the time of training steps alone.
    """

    def __init__(self, run: Path) -> None:
        """Start with nothing measured.

        Args:
            run: the run folder.
        """
        self.run = run
        self.last: dict[str, Any] = {}
        self._seconds = 0.0
        self._steps = 0
        self._tokens = 0
        self._mark = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop lines of later steps."""
        self._tokens = state.num_input_tokens_seen
        self._mark = time.monotonic()
        if state.is_world_process_zero:
            kept = [entry for entry in read_log(self.run) if entry["step"] <= state.global_step]
            write_log(self.run, kept)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the step's time."""
        now = time.monotonic()
        self._seconds += now - self._mark
        self._steps += 1
        self._mark = now

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the evaluation out of the speed."""
        self._mark = time.monotonic()

    on_save = on_evaluate  # nor a checkpoint

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        logs = logs or {}
        entry: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        if "loss" in logs:
            names = ("loss", "retain_loss", "learning_rate", "grad_norm")
            entry |= {name: logs[name] for name in names if name in logs}
            entry |= {name: logs[name] for name in logs if name.startswith(("rewards/", "logps/", "kl"))}
            tokens = state.num_input_tokens_seen - self._tokens
            entry["tokens"] = state.num_input_tokens_seen
            entry["tokens_per_second"] = round(tokens / max(self._seconds, 1e-9), 1)
            entry["seconds_per_step"] = round(self._seconds / max(self._steps, 1), 4)
            entry["memory_bytes"] = peak_bytes(args.device)
            self._tokens, self._seconds, self._steps = state.num_input_tokens_seen, 0.0, 0
        elif "eval_loss" in logs or "eval_retention" in logs:
            entry |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        else:
            return
        self.last = entry
        if state.is_world_process_zero:
            append_entry(self.run, entry)


class _StepMeter(Meter):
    """Steps with the figures of the newest entry of the log."""

    entry: Mapping[str, Any] = MappingProxyType({})
    doing = ""  # between two steps
    says_end = False  # the last step is in the log, and the results follow

    def parts(self, seconds: float, rate: float, *, ended: bool) -> list[tuple[str, int]]:
        """Put the newest figures between the step and the time left."""
        step = f"{self.done:.0f}/{self.total:.0f}"
        eta = f"eta {short_time(0)}" if self.done == self.total else self.eta(rate)
        step = step if self.is_bar else f"step {step}"
        return [(step, 0), *step_parts(self.entry), (self.doing, 0), (eta, 1)]


class ProgressDisplay(TrainerCallback):
    """A progress bar on a terminal; elsewhere one line per log entry, and one if the next takes long."""

    def __init__(self, log: TrainingLog, console: Console | None = None) -> None:
        """Choose the form by the console.

        Args:
            log: where the numbers shown are taken from; has to be called before this callback.
            console: standard error by default.
        """
        self.log = log
        self.console = console or error_console()
        self._meter: _StepMeter | None = None
        self._shown: dict[str, Any] = {}

    @property
    def is_bar(self) -> bool:
        """Whether a bar is being drawn now."""
        return self._meter is not None and self._meter.is_bar

    @property
    def is_open(self) -> bool:
        """Whether steps are being shown now, by a bar or by lines."""
        return self._meter is not None

    def doing(self, text: str) -> None:
        """Say what is being done between two steps, where it takes long; "" when it is over."""
        if self._meter is not None:
            self._meter.doing = text
            if text:
                self._meter.update(self._meter.done)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if state.is_local_process_zero:
            self._meter = _StepMeter(
                "", total=state.max_steps, done=state.global_step, unit="steps", console=self.console
            )
            self._meter.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._meter is not None:
            self._meter.update(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the newest entry of the log."""
        entry = self.log.last
        if self._meter is None or entry is self._shown or not entry:
            return
        self._shown = entry
        if "loss" not in entry:
            self._meter.say(f"step {entry['step']}/{state.max_steps}  {describe_evaluation(entry)}")
            return
        self._meter.entry, self._meter.done = entry, state.global_step
        if not self._meter.is_bar:
            self._meter.say(self._meter.line())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, also after an error, so that the terminal is left in order."""
        if self._meter is not None:
            self._meter.close()
            self._meter = None


class EvaluationDisplay(TrainerCallback):
    """How far an evaluation is, where it takes long: between the steps, and before the first one."""

    def __init__(self, is_bar: Callable[[], bool]) -> None:
        """Start nothing.

        Args:
            is_bar: whether a bar of the steps is drawn now; a terminal has room for one.
        """
        self._is_bar = is_bar
        self._meter: Meter | None = None

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count a batch."""
        if not state.is_local_process_zero or self._is_bar():
            return
        if self._meter is None:
            total = len(eval_dataloader) if eval_dataloader is not None else None
            self._meter = Meter("evaluating", total=total, unit="batches", transient=True)
            self._meter.__enter__()
        self._meter.update(self._meter.done + 1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, also after an error."""
        if self._meter is not None:
            self._meter.close()
            self._meter = None


def describe_evaluation(entry: Mapping[str, Any]) -> str:
    """Word an evaluation.

    Args:
        entry: a line of ``trainer_log.jsonl``.

    >>> describe_evaluation({"eval_loss": 1.25, "eval_accuracy": 0.5})
    'eval loss 1.2500  accuracy 50.0 %'
    >>> describe_evaluation({"eval_loss": 1.25, "eval_accuracy": 0.5, "eval_ads_loss": 1.25})
    'eval loss 1.2500 (ads 1.2500)  accuracy 50.0 %'
    >>> describe_evaluation({"eval_retention": 0.125, "eval_leak_rate": 0.6})
    'kept 12.5 %  leaks 60.0 %'
    >>> ends = {"eval_rewards/margins_low": 1.25, "eval_rewards/margins_high": 1.75}
    >>> describe_evaluation({"eval_loss": 0.25, "eval_accuracy": 0.5, "eval_rewards/margins": 1.5, **ends})
    'eval loss 0.2500  accuracy 50.0 %  margin 1.500 (1.250 to 1.750)'
    """
    parts: list[str] = []
    if "eval_loss" in entry:
        sets = {name: entry[f"eval_{name}_loss"] for name in sets_of(entry)}
        apart = ", ".join(f"{name} {loss:.4f}" for name, loss in sets.items())
        parts.append(f"eval loss {entry['eval_loss']:.4f}" + f" ({apart})" * bool(apart))
        parts.append(f"accuracy {entry['eval_accuracy']:.1%}")
    if "eval_rewards/margins" in entry:
        value, low, high = (entry[f"eval_rewards/margins{end}"] for end in ("", "_low", "_high"))
        parts.append(f"margin {value:.3f} ({low:.3f} to {high:.3f})")
    if "eval_retention" in entry:
        parts.append(f"kept {entry['eval_retention']:.1%}  leaks {entry['eval_leak_rate']:.1%}")
    if "eval_retention_switched_off" in entry:
        parts.append(f"switched off {entry['eval_retention_switched_off']:.1%}")
    return "  ".join(parts).replace("%", " %")


def step_parts(entry: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Word the figures of a step, each with its importance where there is no room for all.

    Args:
        entry: a line of ``trainer_log.jsonl``; there is none before the first.

    >>> numbers = {"loss": 2.0, "learning_rate": 0.02, "grad_norm": 1.5, "tokens_per_second": 812.4}
    >>> "  ".join(text for text, _ in step_parts({**numbers, "memory_bytes": 3 * 2**30}))
    'loss 2.0000  lr 2.00e-02  grad 1.50  812 tok/s  3.0 GiB'
    """
    if "loss" not in entry:
        return []
    loss, grad = entry["loss"], entry.get("grad_norm", 0.0)
    return [
        (f"loss {loss:.4f}" if abs(loss) < 1000 else f"loss {loss:.3e}", 0),
        (f"margin {entry['rewards/margins']:.3f}" if "rewards/margins" in entry else "", 1),
        (f"retain {entry['retain_loss']:.4f}" if "retain_loss" in entry else "", 1),
        (f"lr {entry['learning_rate']:.2e}", 3),
        (f"grad {grad:.2f}" if grad < 1000 else f"grad {grad:.1e}", 4),
        (f"{short_number(entry['tokens_per_second'])} tok/s", 2),
        (f"{entry['memory_bytes'] / 2**30:.1f} GiB", 5),
    ]


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGHUP, SIGINT: finish the step, save a checkpoint, stop. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Take over the signals (in the main thread; elsewhere Python does not allow it)."""
        for number in (signal.SIGINT, *stopping_signals()):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    # Hardly more than a note: a handler runs between any two bytecodes, also while a checkpoint is written.
    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        leave_closed_terminal()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the trainer to save and stop, if a signal came to any process."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            newest = torch.tensor(self.received or 0, device=args.device)
            # A signal may reach one process only, or several in different steps; all stop after the same one.
            torch.distributed.all_reduce(newest, torch.distributed.ReduceOp.MAX)
            self.received = int(newest) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
