"""Callbacks of a run: its flow, the log file, the progress display, stopping on signals.

transformers calls them in the order in which they were added; what a trainer looks for in a run (losses that
jump, slow data) is `glmtune.training.watching`.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.files import write_text
from glmtune.training.log import LOG_FILE, append_entry, read_log


def memory_bytes() -> int:
    """Return the memory in use: the peak allocated on the GPU, else what this process holds."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


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
            write_text(self.run / LOG_FILE, "".join(json.dumps(entry) + "\n" for entry in kept))

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
            entry |= {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            tokens = state.num_input_tokens_seen - self._tokens
            entry["tokens"] = state.num_input_tokens_seen
            entry["tokens_per_second"] = round(tokens / max(self._seconds, 1e-9), 1)
            entry["seconds_per_step"] = round(self._seconds / max(self._steps, 1), 4)
            entry["memory_bytes"] = memory_bytes()
            self._tokens, self._seconds, self._steps = state.num_input_tokens_seen, 0.0, 0
        elif "eval_loss" in logs:
            entry |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        else:
            return
        self.last = entry
        if state.is_world_process_zero:
            append_entry(self.run, entry)


class ProgressDisplay(TrainerCallback):
    """A progress bar on a terminal, one plain line per log entry elsewhere."""

    def __init__(self, log: TrainingLog, console: Console | None = None) -> None:
        """Choose the form by the console.

        Args:
            log: where the numbers shown are taken from; has to be called before this callback.
            console: standard error by default.
        """
        self.log = log
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._shown: dict[str, Any] = {}
        self._first_step = 0
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self._first_step, self._start = state.global_step, time.monotonic()
        if state.is_local_process_zero and self.console.is_terminal:
            columns = (BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the newest entry of the log."""
        entry = self.log.last
        if not state.is_local_process_zero or entry is self._shown or not entry:
            return
        self._shown = entry
        text = describe_step(entry, remaining=self._remaining(state))
        if self._bar is None:
            self.console.print(f"step {entry['step']}/{state.max_steps}  {text}", markup=False)
        elif "eval_loss" in entry:
            self._bar.console.print(f"step {entry['step']}  {text}", markup=False)
        else:
            self._bar.update(self._bar.task_ids[0], description=text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, also after an error, so that the terminal is left in order."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _remaining(self, state: TrainerState) -> float:
        done = max(state.global_step - self._first_step, 1)
        return (time.monotonic() - self._start) / done * (state.max_steps - state.global_step)


def describe_step(entry: dict[str, Any], *, remaining: float) -> str:
    """Word one entry of the log.

    Args:
        entry: a line of ``trainer_log.jsonl``.
        remaining: seconds that the run will probably still take.

    >>> describe_step({"eval_loss": 1.25, "eval_accuracy": 0.5}, remaining=0)
    'eval loss 1.2500  accuracy 50.0 %'
    >>> numbers = {"loss": 2.0, "learning_rate": 0.02, "grad_norm": 1.5, "tokens_per_second": 812.4}
    >>> describe_step({**numbers, "memory_bytes": 3 * 2**30}, remaining=61)
    'loss 2.0000  lr 2.00e-02  grad 1.50  812 tok/s  3.0 GiB  eta 0:01:01'
    """
    if "eval_loss" in entry:
        return f"eval loss {entry['eval_loss']:.4f}  accuracy {entry['eval_accuracy']:.1%}".replace("%", " %")
    eta = timedelta(seconds=round(remaining))
    return (
        f"loss {entry['loss']:.4f}  lr {entry['learning_rate']:.2e}  grad {entry.get('grad_norm', 0.0):.2f}  "
        f"{entry['tokens_per_second']:.0f} tok/s  {entry['memory_bytes'] / 2**30:.1f} GiB  eta {eta}"
    )


# A terminal or an ssh connection that closes sends SIGHUP; Windows has none.
STOPPING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGHUP, SIGINT: finish the step, save a checkpoint, stop. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Take over the signals (in the main thread; elsewhere Python does not allow it)."""
        for number in STOPPING_SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    # Nothing but a note: a handler runs between any two bytecodes, also while a checkpoint is being written.
    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

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


def tensorboard(run: Path, *, after: int | None) -> TensorBoardCallback:
    """Make the callback that writes to ``runs/``.

    Args:
        run: the run folder.
        after: step that the run goes on from; what the files there hold of later steps is taken back, or
            curves would have two values at a step. None for a run that begins.
    """
    from torch.utils.tensorboard import SummaryWriter

    purge_step = None if after is None else after + 1
    return TensorBoardCallback(SummaryWriter(str(run / "runs"), purge_step=purge_step))
