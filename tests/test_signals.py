"""SIGHUP is SIGTERM: both end a command in order, and a closed terminal takes nothing with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glmtune import signals
from glmtune.training.callbacks import StopOnSignal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
BOTH = [signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", BOTH)
def test_a_block_ends_in_order_and_the_second_signal_ends_the_process(number: int) -> None:
    code = """
import os, sys
from glmtune import signals
try:
    with signals.raised():
        try:
            os.kill(os.getpid(), int(sys.argv[1]))
        finally:
            print("cleaned", flush=True)
except KeyboardInterrupt as stop:
    print(stop, stop.number, flush=True)
with signals.raised():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
    finally:
        os.kill(os.getpid(), int(sys.argv[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(int(number))], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"cleaned\n{number.name} {int(number)}\n"
    assert done.returncode == -number


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with signals.raised():
        assert [signal.getsignal(number) for number in BOTH] != before
    assert [signal.getsignal(number) for number in BOTH] == before


def test_under_nohup_a_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raised():
            os.kill(os.getpid(), signal.SIGHUP)
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def in_terminal(code: str, *words: str) -> tuple[int, int]:
    """Run Python in a terminal of its own; returns the process and our end of the terminal."""
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", code, *words])
    return process, terminal


def closed_when(ready: Path, process: int, terminal: int, seconds: float) -> int:
    """Close a terminal once a file is there; returns how its process ended."""
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + seconds
    while not ready.exists():
        assert time.monotonic() < deadline
        try:
            os.read(terminal, 65536)
        except (BlockingIOError, OSError):
            time.sleep(0.02)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_output_after_the_terminal_is_closed_goes_nowhere(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from glmtune.training.callbacks import StopOnSignal
with StopOnSignal() as stop:
    Path(sys.argv[1], "ready").touch()
    while stop.received is None:
        time.sleep(0.01)
    print("step 2", flush=True)
    print("step 2", file=sys.stderr, flush=True)
Path(sys.argv[1], f"saved {stop.received}").touch()
"""
    process, terminal = in_terminal(code, str(tmp_path))
    assert closed_when(tmp_path / "ready", process, terminal, 100) == 0
    assert (tmp_path / f"saved {int(signal.SIGHUP)}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True])
def test_a_run_whose_terminal_is_closed_saves(
    launched: bool, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [
        *("train", "+recipe=ptuning", "prefix.pre_seq_len=4", "data=files", "data.layout=adgen"),
        *(f"data.train_file={tiny_rows['train']}", f"model.source={tiny_base}", "model.device=cpu"),
        *("retention=null", "trainer.max_steps=100000", "trainer.save_steps=20", "trainer.logging_steps=1"),
        *("trainer.report_to=[]", f"output_dir={run}", *["launch.num_processes=2"] * launched),
    ]
    code = "import sys\nfrom glmtune.cli import main\nsys.argv[0] = 'glmtune'\nsys.exit(main(sys.argv[1:]))"
    process, terminal = in_terminal(code, *words)
    assert closed_when(run / "checkpoint-20", process, terminal, 300) == 128 + signal.SIGHUP
    steps = sorted(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))
    assert steps[-1] % 20, "the last one is that of the signal"
