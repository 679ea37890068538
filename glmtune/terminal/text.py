"""Make control characters visible, and see to it that whatever a process prints has gone through that."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import traceback
import warnings
from typing import Any

# C0 without line feed and tab, DEL, C1 (a terminal may read U+009B as ESC [, U+0085 as a line end); line and
# paragraph separators and the overrides that let text run backwards; halves of surrogate pairs, which no
# encoding writes. Marks that only say which way a word runs (U+200E, U+200F) stay: Hebrew and Arabic use
# them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""Return text as a terminal may have it: characters that it would obey are written as ``\uXXXX``.

    The form is JSON's, so that JSON and quoted YAML still say the same when they are printed.

    Args:
        text: of whatever origin; line feeds and tabs stay.

    >>> shown("a\x1b[31m red, b\ta tab")
    'a\\u001b[31m red, b\ta tab'
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write(text: str) -> None:
    """Write text to standard output, its control characters made visible."""
    sys.stdout.write(shown(text))


def write_now(text: str) -> None:
    """Write text that somebody waits for, such as a piece of an answer: see `write`."""
    write(text)
    sys.stdout.flush()


def write_error(text: str) -> None:
    """Write text to standard error, its control characters made visible."""
    sys.stderr.write(shown(text))


def flush_output() -> None:
    """Hand everything written so far to the system: for a process that is about to end as it is."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]


def guard_output() -> None:
    """Let what others print in this process be shown like our own: logs, warnings and uncaught errors.

    Libraries quote files and servers, too. Called once by the command line; a program that uses glmtune as a
    library keeps its own arrangements.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its number instead of ending the command.
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_ShownRecord)
    warnings.formatwarning = _format_warning
    sys.excepthook = _show_uncaught
    threading.excepthook = _show_uncaught_in_thread


class _ShownRecord(logging.LogRecord):
    """A record of a log: here every handler of every library asks for the text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            # Formatters take a trace that is there already, and would add one as it is.
            self.exc_text = shown("".join(traceback.format_exception(*self.exc_info))).rstrip("\n")

    def getMessage(self) -> str:
        return shown(super().getMessage())


_plain_warning = warnings.formatwarning


def _format_warning(*args: Any, **kwargs: Any) -> str:
    return shown(_plain_warning(*args, **kwargs))


def _show_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    write_error("".join(traceback.format_exception(kind, error, trace)))


def _show_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
        name = arguments.thread.name if arguments.thread is not None else "unknown"
        write_error(f"Exception in thread {name}:\n")
        _show_uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
