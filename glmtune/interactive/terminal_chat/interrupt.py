"""Ctrl-C while an answer comes: it ends the answer and nothing else; what is typed meanwhile is not shown."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Generator
from types import FrameType

try:
    import termios
except ImportError:  # Windows has no such thing: letters typed during an answer are shown there
    termios = None


@contextlib.contextmanager
def on_interrupt(act: Callable[[], object]) -> Generator[None]:
    """Run a block in which Ctrl-C calls a function instead of raising KeyboardInterrupt anywhere.

    Raised in the middle of a write to the terminal or of a lock of the engine, it would leave halves behind.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        act()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def keys_unseen() -> Generator[None]:
    """Run a block in which the terminal does not echo: what is typed ahead waits for the next prompt."""
    if termios is None:
        yield
        return
    try:
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
        unseen = list(before)
        unseen[3] &= ~termios.ECHO
        termios.tcsetattr(keyboard, termios.TCSANOW, unseen)
    except (OSError, termios.error):  # no terminal, or one that goes away
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(keyboard, termios.TCSANOW, before)
