"""Progress: lines now and then in a file or a pipe, a bar on a terminal, one line of the width there is."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len

from glmtune.terminal.console import Console
from glmtune.terminal.progress import Meter, fit, short_number, short_time


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def piped(width: int = 80) -> tuple[io.StringIO, Console]:
    output = io.StringIO()
    return output, Console(file=output, width=width, force_terminal=False)


def test_a_pipe_gets_lines_now_and_then() -> None:
    output, console = piped()
    clock = Clock()
    with Meter("predict", total=1000, console=console, clock=clock) as meter:
        for row in range(1, 1001):
            clock.now += 0.125  # exact in binary
            meter.update(row, tokens=20, state="accuracy 50.0 %")
    lines = output.getvalue().splitlines()
    assert 4 <= len(lines) <= 6, "after 5 seconds, then every 30, and at the end of 125"
    assert lines[0] == "predict  40/1000 rows  4%  8 rows/s  160 tokens/s  eta 2:00  accuracy 50.0 %"
    assert lines[-1] == "predict  1000/1000 rows  8 rows/s  160 tokens/s  in 2:05  accuracy 50.0 %"


def test_resumed_rows_count_as_done_and_not_as_fast() -> None:
    output, console = piped()
    clock = Clock()
    with Meter("predict", total=1000, done=900, console=console, clock=clock) as meter:
        clock.now += 10
        meter.update(910)
    assert output.getvalue().splitlines()[0] == "predict  910/1000 rows  91%  1 rows/s  eta 1:30"


def test_nothing_done_yet_has_no_time_left() -> None:
    output, console = piped()
    clock = Clock()
    with Meter("x", total=10, done=4, console=console, clock=clock) as meter:
        clock.now += 60
        meter.update(4)
        assert "eta unknown" in output.getvalue()
        meter.update(4, total=0)


@pytest.mark.parametrize(("seconds", "lines"), [(1.0, 0), (40.0, 2)])
def test_a_short_phase_in_passing_leaves_nothing(seconds: float, lines: int) -> None:
    output, console = piped()
    clock = Clock()
    with Meter("encoding", total=4, console=console, clock=clock, transient=True) as meter:
        for row in range(1, 5):
            clock.now += seconds / 4
            meter.update(row)
    assert len(output.getvalue().splitlines()) == (lines and lines + 1)


def test_an_error_leaves_a_line_that_does_not_look_like_the_end() -> None:
    output, console = piped()
    clock = Clock()

    def fail() -> None:
        with Meter("predict", total=10, console=console, clock=clock) as meter:
            clock.now += 2
            meter.update(5)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert output.getvalue() == "predict  5/10 rows  50%  2.5 rows/s  eta 0:02\n"


def test_a_terminal_gets_a_bar() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, color_system=None)
    with Meter("C-Eval val", total=5, console=console, unit="questions") as meter:
        assert meter.is_bar
        meter.update(3)
    said = output.getvalue()
    assert "\x1b[?25l" in said
    assert "3/5 questions" in said
    assert not meter.is_bar


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("title", ["predict", "评测" * 60, "a\x1b]0;title\x07" * 20, ""])
def test_lines_fit(title: str, width: int, terminal: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=width, color_system=None)
    clock = Clock()
    with Meter(title, total=6_243_584_000, console=console, clock=clock, unit="weights") as meter:
        clock.now += 31
        meter.update(1_234_567_890, tokens=10**12, state="accuracy 12.3 %  unparsed 1234  failed 99999")
    said = re.sub("\x1b\\[[?0-9;]*[A-Za-z]", "", output.getvalue())
    assert "\x1b" not in said
    lines = [line.rstrip() for line in re.split("[\r\n]", said) if line.strip()]
    assert max(map(cell_len, lines)) <= max(width, 60), lines


def test_what_matters_least_goes_first() -> None:
    parts = [("3/9 rows", 0), ("2 rows/s", 2), ("eta 1:00", 1), ("accuracy 1 %", 3)]
    assert fit(parts, 80) == "3/9 rows  2 rows/s  eta 1:00  accuracy 1 %"
    assert fit(parts, 30) == "3/9 rows  2 rows/s  eta 1:00"
    assert fit(parts, 20) == "3/9 rows  eta 1:00"
    assert fit(parts, 3) == "3/9 rows"


def test_numbers_and_times_stay_short() -> None:
    for power in range(-3, 16):
        for digits in (1.0, 9.994, 9.996, 9.9999):
            assert len(short_number(digits * 10.0**power)) <= 7
    assert all(len(short_time(10.0**power)) <= 8 for power in range(10))


def test_lines_go_to_the_error_stream() -> None:
    program = (
        "from glmtune.terminal.progress import Meter\n"
        "with Meter('predict', total=2) as meter:\n    meter.update(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    assert done.stderr.startswith("predict  2/2 rows")
