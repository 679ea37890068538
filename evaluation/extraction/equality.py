"""Whether two formulas are equal, asked of math-verify in a process of its own.

What a model writes may be a formula that no computer algebra gets through, or one that takes all memory
(``9^{9^{9^9}}``). math-verify bounds its own time by signals, which work in a main thread only and do not
stop what is computed in C. So a child process compares, with a bound of its memory, and is ended from outside
when it takes too long. What is then unknown is said to be unknown (None), and not remembered: another time
the machine may be less busy. The child is shown formulas as LaTeX only, for which math-verify has a grammar:
nothing that a model wrote is evaluated as a program.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from functools import lru_cache
from importlib.util import find_spec
from queue import Empty, Queue
from typing import IO

from glmtune.errors import GlmtuneError, MissingExtraError

EXTRA = "math"
SECONDS = 5.0
"""For one pair; most take milliseconds, and the first of a process the import of sympy besides."""
START_SECONDS = 60.0
REMEMBERED = 16_384
"""Pairs whose outcome is kept: reports read every answer anew."""


def check_extra() -> None:
    """Say early that formulas cannot be compared.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    if find_spec("math_verify") is None:
        raise MissingExtraError("Comparing formulas (benchmark=math500, benchmark=math)", extra=EXTRA)


class _Unknown(Exception):
    """No outcome in time or memory: raised, as a cache keeps what is returned and not what is raised."""


def are_equal(gold: str, answer: str) -> bool | None:
    r"""Say whether two LaTeX formulas have the same value; None where that cannot be found out in time.

    Args:
        gold: the right formula, without dollar signs.
        answer: the other.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    check_extra()
    try:
        return _outcome(gold, answer)
    except _Unknown:
        return None


@lru_cache(REMEMBERED)
def _outcome(gold: str, answer: str) -> bool:
    return _comparer.ask(gold, answer)


class _Comparer:
    """The child process: started when it is needed, and anew after one that had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._replies: Queue[str] = Queue()
        self._lock = threading.Lock()
        self._owner = 0

    def ask(self, gold: str, answer: str) -> bool:
        """Return the child's outcome; raises `_Unknown` where it has none."""
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
                self._start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                outcome = json.loads(self._replies.get(timeout=SECONDS))
            except (Empty, OSError, ValueError):  # too long, or ended by its own bound of memory
                self.end()
                raise _Unknown from None
            except BaseException:  # interrupted: the reply still to come would be taken for the next one's
                self.end()
                raise
            if outcome is None:
                raise _Unknown
            return outcome is True

    def _start(self) -> None:
        # `-P`: a file of the user's called `sympy.py` in the working folder is not what is meant.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="backslashreplace",
        )
        self._owner, self._replies = os.getpid(), Queue()
        assert self._process.stdout is not None
        reader = threading.Thread(target=_pass_on, args=(self._process.stdout, self._replies), daemon=True)
        reader.start()
        try:
            has_begun = bool(self._replies.get(timeout=START_SECONDS))  # it has imported what it needs
        except Empty:
            has_begun = False
        if not has_begun:
            self.end()
            raise GlmtuneError(
                f"`import math_verify` did not work within {START_SECONDS:g} seconds in a process of its own,"
                " so formulas cannot be compared. Try `pip install --force-reinstall"
                f" 'glmtune[{EXTRA}]'`. Answers are kept: the same command scores them."
            )

    def end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._process = None


def _pass_on(stream: IO[str], replies: Queue[str]) -> None:
    for line in stream:
        replies.put(line)
    replies.put("")  # it has ended


_CHILD = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import LatexExtractionConfig, parse, verify
try:
    import resource
except ImportError:  # Windows: the bound of time remains
    pass
else:
    for kind, bound in ((resource.RLIMIT_AS, 4 << 30), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (bound, bound))
        except (ValueError, OSError):  # a lower bound holds already (a cluster's), or the system has none
            pass
def read(formula):
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse("$" + formula.replace("$", "") + "$", extraction_config=config, parsing_timeout=None)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    try:
        gold, answer = map(read, json.loads(line))
        same = bool(gold and answer) and bool(verify(gold, answer, timeout_seconds=None))
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        same = None if isinstance(error, MemoryError) else False
    print(json.dumps(same), flush=True)
"""

_comparer = _Comparer()
atexit.register(_comparer.end)
