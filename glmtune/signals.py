"""Signals that end a command in order: SIGTERM, and SIGHUP, which a closed terminal or ssh connection sends.

Windows has no SIGHUP; its SIGBREAK stands for a closed window, a shutdown and Ctrl-Break.

`glmtune.training.callbacks` gives them a meaning of its own while a run trains; everywhere else they end a
command as Ctrl-C does, so that what is half-written is removed and locks are released.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

HANGUP: int | None = getattr(signal, "SIGHUP", None)
BREAK: int | None = getattr(signal, "SIGBREAK", None)


class StoppedBySignal(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; whoever cleans up after Ctrl-C does so after these.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        """Keep the number.

        Args:
            number: of the signal.
        """
        self.number = number
        super().__init__(signal.Signals(number).name)


def stopping_signals() -> tuple[int, ...]:
    """Return the signals that ask a command to end in order, Ctrl-C aside.

    Under `nohup` SIGHUP is ignored when we begin, and stays so: the run was meant to outlive its terminal.
    """
    found: list[int] = [signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        found.append(HANGUP)
    if BREAK is not None:
        found.append(BREAK)
    return tuple(found)


@contextlib.contextmanager
def raised() -> Generator[None]:
    """Run a block in which these signals raise `StoppedBySignal`; the second one ends the process as it is.

    Python hands signals to the main thread alone; a block in another one runs as it would without this.
    """
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        leave_closed_terminal()
        raise StoppedBySignal(number)

    for number in stopping_signals():
        with contextlib.suppress(ValueError):
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    """Run a block in which Ctrl-C and these signals call a function instead; for servers, in the main thread.

    Args:
        handler: is given the number of the signal; it must not wait, as it may interrupt anything.
    """
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, *stopping_signals())}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def leave_closed_terminal() -> None:
    """Write to nowhere from now on if the terminal was closed: the next line of output would be an error.

    A checkpoint that is due after SIGHUP would then be lost for the sake of a progress bar.
    """
    for handle in (1, 2):
        # A terminal that was closed is a character device still, but answers nothing.
        with contextlib.suppress(OSError):
            if HANGUP is not None and os.major(os.fstat(handle).st_rdev) and not os.isatty(handle):
                _to_nowhere(handle)


def _to_nowhere(handle: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, handle)
    os.close(nowhere)
