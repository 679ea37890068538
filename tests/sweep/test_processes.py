"""Commands in processes of their own: how they end, how they are ended, how far they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from glmtune.sweep import processes
from glmtune.sweep.processes import Ended, last_line, progress_of, run_command
from glmtune.training.distributed.parent import STARTED_BY

SLEEPER = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
def end(number, frame):
    (place / 'ended').write_text('in order')
    sys.exit(143)
if sys.argv[2] == 'polite':
    signal.signal(signal.SIGTERM, end)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(place / 'began').write_text(str(os.getpid()))
time.sleep(60)
"""
WATCHED = """
import os, pathlib, sys, time
from glmtune.training.distributed import parent
parent.watch()
assert parent.STARTED_BY not in os.environ
pathlib.Path(sys.argv[1], 'began').write_text(str(os.getpid()))
time.sleep(60)
"""


def wait_for(is_so: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_what_a_command_says_and_how_it_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of an earlier start\n")
    ended = run_command(["info", "nothing=1"], log)
    assert ended.code == 2
    assert ended.said.startswith("glmtune: `nothing` is no setting of `glmtune info`")
    assert ended.reason.startswith("exit code 2: glmtune: `nothing`")
    assert log.read_text().startswith("of an earlier start\n")


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (Ended(1, ""), "exit code 1"),
        (Ended(-9, "half a line"), "killed by SIGKILL, as the system does where memory runs out"),
        (Ended(-15, ""), "killed by SIGTERM"),
        (Ended(-250, ""), "killed by signal 250"),
    ],
    ids=["silent", "killed", "terminated", "unknown"],
)
def test_reasons(ended: Ended, reason: str) -> None:
    assert ended.reason == reason


@pytest.mark.parametrize("kind", ["polite", "deaf"])
def test_who_stops_the_sweep_stops_its_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first interruption asks it to end in order, a second one kills it."""
    # A shell that starts us in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(processes, "OWN_PROGRAM", ("-c", SLEEPER))
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.05)

    def interrupt() -> None:
        if (tmp_path / "began").exists() and (tmp_path / "began").read_text():
            if kind == "deaf":
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            run_command([str(tmp_path), kind], tmp_path / "log", interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "ended").exists() == (kind == "polite")
    process = int((tmp_path / "began").read_text())
    wait_for(lambda: not is_alive(process))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="kills as Unix does")
def test_a_run_ends_when_the_sweep_is_killed(tmp_path: Path) -> None:
    starter = (
        "import os, subprocess, sys; from pathlib import Path\n"
        f"environment = {{**os.environ, {STARTED_BY!r}: str(os.getpid())}}\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], env=environment).wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter, WATCHED, str(tmp_path)])
    began = tmp_path / "began"
    wait_for(lambda: began.exists() and began.read_text() != "")
    process = int(began.read_text())
    assert is_alive(process)
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_alive(process), 10)


@pytest.mark.parametrize(
    ("lines", "settings", "expected"),
    [
        ("", {"max_steps": 10}, 0.0),
        ('{"step": 0}\n{"step": 4, "epoch": 0.5}\n', {"max_steps": 10}, 0.4),
        ('{"step": 4, "epoch": 0.5}\n', {"max_steps": None, "num_train_epochs": 2.0}, 0.25),
        ('{"step": 40}\n', {"max_steps": 10}, 1.0),
        ('{"step": 4}\n{"st', {"max_steps": 10}, 0.0),
    ],
    ids=["empty", "steps", "epochs", "beyond", "torn"],
)
def test_how_far_a_run_is(lines: str, settings: dict[str, Any], expected: float, tmp_path: Path) -> None:
    assert progress_of(tmp_path / "none", settings) == 0
    (tmp_path / "trainer_log.jsonl").write_text(lines)
    assert progress_of(tmp_path, settings) == expected


def test_the_last_line_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 20_000 + "\n最后一行\n\n".encode())
    assert last_line(log) == "最后一行"
    assert last_line(tmp_path / "none") == ""
