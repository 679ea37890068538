"""How far something is: one display for every command, a bar on a terminal and a line now and then elsewhere.

What a bar shows is drawn over; a file or a pipe (Slurm, nohup, tee) keeps every line, so there it gets one
early (is it going at all, and how long will it take?), then one every half minute, and one at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.cells import cell_len, chop_cells
from rich.progress import BarColumn, TextColumn

from glmtune.terminal.console import Console, Progress
from glmtune.terminal.text import shown

FIRST_SECONDS = 5.0
EVERY_SECONDS = 30.0
BAR_WIDTH = 8
GAP = "  "
TITLE_CELLS = 32
"""Room for a title: a benchmark or a file may be called anything."""


def error_console() -> Console:
    """Return a console on standard error: progress goes there, so that standard output holds results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def short_number(value: float) -> str:
    """Write a number in at most six characters, exactly below 100,000 where it is whole.

    >>> [short_number(number) for number in (0.25, 3.456, 200, 99999, 812.4, 6_243_584_000)]
    ['0.25', '3.46', '200', '99999', '812', '6.24G']
    """
    # The bounds lie half a digit below the round number: from there on rounding needs one digit more.
    if value >= 99_999.5:
        for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= 0.9995 * power:
                scaled = value / power
                return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{letter}"
    return f"{value:.0f}" if float(value).is_integer() or value >= 99.95 else f"{value:.3g}"


def short_time(seconds: float) -> str:
    """Write a duration in at most eight characters.

    >>> [short_time(seconds) for seconds in (7.4, 61, 3600, 90_000, 1e9)]
    ['0:07', '1:01', '1:00:00', '1d 1h', '11574d']
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h" if days < 1000 else f"{days}d"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def fit(parts: Sequence[tuple[str, int]], width: int) -> str:
    """Join the parts of a line, the least important ones left out until it fits.

    Args:
        parts: text and importance of each, in the order of the line; importance 0 always stays.
        width: of the line, in cells of a terminal (a Chinese character takes two).

    >>> fit([("step 3/9", 0), ("loss 2.0", 1), ("3.0 GiB", 3), ("eta 1:00", 2)], 30)
    'step 3/9  loss 2.0  eta 1:00'
    """
    kept = [(text, importance) for text, importance in parts if text]
    while cell_len(line := GAP.join(text for text, _ in kept)) > width:
        least = max(kept, key=lambda part: part[1], default=("", 0))
        if least[1] == 0:
            break
        kept.remove(least)
    return line


class Meter:
    """Shows how far one phase is: done of total, rate, time left. A context; safe to leave after an error."""

    says_end = True
    """Whether a file or a pipe is told of the end."""

    def __init__(
        self,
        title: str,
        *,
        total: float | None = None,
        done: float = 0,
        unit: str = "rows",
        console: Console | None = None,
        transient: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start nothing yet.

        Args:
            title: of the phase, of whatever origin.
            total: how much there is to do; None while unknown.
            done: what was there before. It counts as done, but not for the rate: what an earlier run did took
                this one no time.
            unit: of both, in the plural.
            console: where to; standard error by default.
            transient: leave nothing behind, unless it took long enough for a line.
            clock: seconds, for tests.
        """
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = done
        self.console = console or error_console()
        self._transient, self._clock = transient, clock
        self._tokens = 0
        self._state = ""
        self._bar: Progress | None = None
        self._began = self._due = 0.0
        self._has_said = False

    def __enter__(self) -> Meter:
        """Open the bar, or set the time of the first line."""
        self._began = self._clock()
        self._due = self._began + FIRST_SECONDS
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=BAR_WIDTH), TextColumn("{task.description}"))
            options = {"transient": self._transient, "refresh_per_second": 4}
            self._bar = Progress(*columns, console=self.console, **options)
            self._bar.add_task(self.line(), total=self.total, completed=int(self.done))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close(ended=kind is None)

    def close(self, *, ended: bool = True) -> None:
        """Close the bar, or say the last line.

        Args:
            ended: false where an error cut the phase short.
        """
        line, bar = self.line(ended=ended), self._bar
        if bar is not None:
            self._bar = None
            bar.update(bar.task_ids[0], description=line)
            bar.stop()
        elif self.says_end and (not self._transient or self._has_said):
            self.say(line)

    @property
    def is_bar(self) -> bool:
        """Whether a bar is being drawn now."""
        return self._bar is not None

    def update(
        self, done: float, *, total: float | None = None, tokens: int = 0, state: str | None = None
    ) -> None:
        """Say how far it is.

        Args:
            done: all that is done, what was there before included.
            total: replaces the one known so far.
            tokens: further tokens, for phases whose speed is counted in them.
            state: what else there is to say, such as an accuracy.
        """
        self.done, self._tokens = done, self._tokens + tokens
        self.total = self.total if total is None else total
        self._state = self._state if state is None else state
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=self.line(), total=self.total, completed=done)
        elif self._clock() >= self._due:
            self.say(self.line())

    def line(self, *, ended: bool = False) -> str:
        """Word how far it is, in one line that fits the console.

        Args:
            ended: the phase is over: how long it took takes the place of how long it will take.
        """
        seconds = max(self._clock() - self._began, 1e-9)
        return fit(self.parts(seconds, (self.done - self._first) / seconds, ended=ended), self._width())

    def parts(self, seconds: float, rate: float, *, ended: bool) -> list[tuple[str, int]]:
        """Return the parts of a line, see `fit`; a kind of phase with figures of its own has others.

        Args:
            seconds: since the phase began.
            rate: units a second, without those that were there before.
            ended: see `line`.
        """
        of = "" if self.total is None else f"/{short_number(self.total)}"
        share = f"{self.done / self.total:.0%}" if self.total and not ended else ""
        return [
            (chop_cells(shown(self.title), TITLE_CELLS)[0] if self.title else "", 0),
            (f"{short_number(self.done)}{of} {self.unit}", 0),
            (share, 5),
            (f"{short_number(rate)} {self.unit}/s" if rate else "", 2),
            (f"{short_number(self._tokens / seconds)} tokens/s" if self._tokens else "", 4),
            (f"in {short_time(seconds)}" if ended else self.eta(rate), 1),
            (shown(self._state), 3),
        ]

    def eta(self, rate: float) -> str:
        """Word how long the rest will take at a rate; nothing where nobody knows how much there is."""
        if self.total is None:
            return ""
        return f"eta {short_time((self.total - self.done) / rate)}" if rate else "eta unknown"

    def _width(self) -> int:
        return self.console.width - (BAR_WIDTH + 1 if self.console.is_terminal else 0)

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one; the next one that is due waits for it."""
        self._has_said = True
        self._due = self._clock() + EVERY_SECONDS
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
