"""A limit on the time that a stranger's program takes in this process: Jinja has none.

One thread watches all that run, as a thread for each would cost more than the rendering of a template. It
raises an exception in whoever is over its time: between two steps of Python, so what one call of the C
library takes cannot be cut short.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

IDLE_SECONDS = 10.0
"""How long the watching thread waits for the next program before it ends."""


class TookTooLongError(BaseException):
    """Raised inside a program; no `Exception`, so that nothing in it catches it."""


class _Watch:
    """What runs now, by thread, until when; and which were ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}
        self.ended: set[int] = set()
        self.thread: threading.Thread | None = None


_WATCH = _Watch()


def limited(run: Callable[[], str], seconds: float) -> str | None:
    """Run a program; None: it took longer and was ended.

    Args:
        run: the program; whatever it raises is raised.
        seconds: it may take.
    """
    ident = threading.get_ident()
    try:
        _begin(ident, seconds)
        try:
            return run()
        finally:
            _end(ident)
    except TookTooLongError:
        _end(ident)  # raised between the program's end and ours, the first call may not have come to its end
        return None


def _begin(ident: int, seconds: float) -> None:
    with _WATCH.lock:
        _WATCH.deadlines[ident] = time.monotonic() + seconds
        # A forked process has none of its parent's threads: they are not alive there.
        if _WATCH.thread is None or not _WATCH.thread.is_alive():
            pause = min(seconds / 4, 0.5)
            _WATCH.thread = threading.Thread(target=_watch, args=(pause,), name="glmtune-limit", daemon=True)
            _WATCH.thread.start()


def _end(ident: int) -> None:
    with _WATCH.lock:
        _WATCH.deadlines.pop(ident, None)
        if ident in _WATCH.ended:
            _WATCH.ended.discard(ident)
            _raise_in(ident, None)  # takes back what was not raised yet


def _watch(pause: float) -> None:
    last = time.monotonic()
    while True:
        time.sleep(pause)
        now = time.monotonic()
        with _WATCH.lock:
            if _WATCH.deadlines:
                last = now
            elif now - last > IDLE_SECONDS:
                _WATCH.thread = None
                return
            for ident in [each for each, deadline in _WATCH.deadlines.items() if now > deadline]:
                del _WATCH.deadlines[ident]
                _WATCH.ended.add(ident)
                _raise_in(ident, TookTooLongError)


def _raise_in(ident: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(ident), None if error is None else ctypes.py_object(error)
    )
