"""Commands of ours in processes of their own: what one does to memory, or dies of, ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmtune.storage.files import write_error
from glmtune.training.distributed.launch import OWN_PROGRAM
from glmtune.training.distributed.parent import STARTED_BY
from glmtune.training.log import LOG_FILE

POLL_SECONDS = 0.5
TAIL_BYTES = 8192
"""Of a log, enough for its last line."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; negative for the signal that killed it.
        said: its last line, for whoever asks why.
    """

    code: int
    said: str

    @property
    def reason(self) -> str:
        """Why it ended so, in words."""
        if self.code >= 0:
            return f"exit code {self.code}: {self.said}" if self.said else f"exit code {self.code}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-self.code).name
            hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
            return f"killed by {name}{hint}"
        return f"killed by signal {-self.code}"


def run_command(words: Sequence[str], log: Path, waiting: Callable[[], object] = lambda: None) -> Ended:
    """Run a command of ours to its end; what it says goes into a file.

    A signal that ends this process ends the other one first, in order: a run saves a checkpoint. A second one
    kills it. If this process is killed, the other ends by itself (``distributed/parent.py``).

    Args:
        words: the command's name, and its overrides.
        log: where what it says is added.
        waiting: called now and then meanwhile.

    Raises:
        GlmtuneError: the log cannot be written, or no process be started.
    """
    begin = log.stat().st_size if log.exists() else 0
    environment = {**os.environ, STARTED_BY: str(os.getpid())}
    try:
        with log.open("ab") as file:
            # A session of its own: Ctrl-C reaches the two of them once, not twice.
            process = subprocess.Popen(
                [sys.executable, *OWN_PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise write_error(log, error) from None
    code = _wait(process, waiting)
    return Ended(code, last_line(log, begin) if code else "")


def _wait(process: subprocess.Popen[bytes], waiting: Callable[[], object]) -> int:
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_SECONDS)
            waiting()
    except BaseException:
        process.terminate()
        try:
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        raise


def last_line(log: Path, begin: int = 0) -> str:
    """Return the last line that is not empty of what a log holds from a byte on."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(begin, end - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def progress_of(run: Path, settings: Mapping[str, object]) -> float:
    """Return how far a run is, from 0 to 1, by the last line of its log.

    Args:
        run: its folder.
        settings: its settings ``trainer``.
    """
    try:
        with (run / LOG_FILE).open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - TAIL_BYTES))
            lines = file.read().splitlines()
        last = json.loads(lines[-1])
        for done, total in (("step", "max_steps"), ("epoch", "num_train_epochs")):
            wanted = settings.get(total)
            if isinstance(wanted, int | float):
                return min(1.0, float(last[done]) / wanted)
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not begun, or a line that is being written
    return 0.0
