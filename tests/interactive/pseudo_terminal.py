"""A command in a pseudo-terminal: keys in, and what a screen would show out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SEQUENCE = re.compile(r"\x1b(\[[0-9;?<>=]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[()][A-Z0-9]|[=>78])")
DEADLINE_SECONDS = 90.0
"""Ends a test that hangs; nothing is asserted of how long anything takes."""


class Terminal:
    """A running command whose terminal is ours.

    Attributes:
        raw: all that it wrote.
        seen: what was read so far, for `until`.
    """

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, home: Path
    ) -> None:
        """Start it in a terminal of 100 columns."""
        self._screen, keyboard = pty.openpty()
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        settings = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(home)}
        self.process = subprocess.Popen(
            command,
            stdin=keyboard,
            stdout=keyboard,
            stderr=keyboard,
            env={**os.environ, "NO_COLOR": "1", **settings, **(environment or {})},
            start_new_session=True,
            # Without a controlling terminal Ctrl-C would be a character like others.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )
        os.close(keyboard)
        self.raw = b""
        self._place = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._screen)

    @property
    def text(self) -> str:
        """What was written, without the sequences that move and colour."""
        return SEQUENCE.sub("", self.raw.decode("utf-8", "replace")).replace("\r", "").replace("\x08", "")

    def type(self, keys: str) -> None:
        """Press keys; Enter is ``\\r``, Ctrl-C ``\\x03``, Alt-Enter ``\\x1b\\r``."""
        os.write(self._screen, keys.encode())

    def until(self, pattern: str) -> str:
        """Wait until something was written after what was waited for before; return all in between."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            text = self.text
            if found := re.compile(pattern, re.DOTALL).search(text, self._place):
                between, self._place = text[self._place : found.end()], found.end()
                return between
            if not self._read(deadline):
                raise AssertionError(f"{pattern!r} did not come:\n{text[self._place :]}")

    def until_answering(self) -> None:
        """Wait until an answer is on its way: only then is Ctrl-C a signal, and no key of the prompt."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            flags = termios.tcgetattr(self._screen)[3]
            if flags & termios.ICANON and not flags & termios.ECHO:
                self._place = len(self.text)
                return
            self._read(time.monotonic() + 0.05)
        raise AssertionError("no answer began")

    def end(self) -> int:
        """Wait for the end and return the exit code."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self._read(deadline):
            pass
        return self.process.wait(timeout=30)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._screen], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return False
        try:
            data = os.read(self._screen, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        return bool(data)


def chat(*words: str, python: Sequence[str] = (sys.executable,)) -> list[str]:
    """Return the command line of `glmtune chat`."""
    return [*python, "-m", "glmtune", "chat", *words]
