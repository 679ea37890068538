"""A launcher killed with SIGKILL: nothing of it trains on, and the same command ends with the same numbers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
CLOCK = ("time", "tokens_per_second", "seconds_per_step", "memory_bytes", "eval_runtime", "train_runtime")
LAUNCHERS = {
    "ours": [sys.executable, "-m", "glmtune", "train", "launch.num_processes=2"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "glmtune", "train"),
    ],
}


def words(base: Path, rows: dict[str, Path], run: Path) -> list[str]:
    return [
        "+recipe=ptuning",
        "prefix.pre_seq_len=4",
        "prefix.dropout=0.2",
        "data=files",
        "data.layout=adgen",
        f"data.train_file={rows['train']}",
        f"data.validation_file={rows['validation']}",
        f"model.source={base}",
        "model.device=cpu",
        "retention=null",
        "trainer.max_steps=120",
        "trainer.per_device_train_batch_size=2",
        "trainer.gradient_accumulation_steps=1",
        "trainer.logging_steps=3",
        "trainer.eval_steps=50",
        "trainer.save_steps=20",
        "trainer.report_to=[]",
        f"output_dir={run}",
    ]


def start(command: list[str]) -> subprocess.Popen[str]:
    values = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=values,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(command: list[str]) -> str:
    process = start(command)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    return said


def log(run: Path) -> list[dict[str, Any]]:
    file = run / "trainer_log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def learnt(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in CLOCK} for entry in log(run)]


def results(run: Path) -> dict[str, Any]:
    found = json.loads((run / "all_results.json").read_text())
    return {name: found[name] for name in ("steps", "train_loss", "final_eval_loss", "best_step")}


def kill_at_step(launcher: subprocess.Popen[str], run: Path, step: int) -> list[psutil.Process]:
    """Kill a launcher as soon as a step is logged; returns the processes below it."""
    deadline = time.monotonic() + 300
    try:
        while not any(entry["step"] >= step and "loss" in entry for entry in log(run)):
            assert launcher.poll() is None, launcher.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return psutil.Process(launcher.pid).children(recursive=True)
    finally:
        launcher.kill()
        launcher.wait()


def assert_gone(processes: list[psutil.Process]) -> None:
    assert len(processes) >= 2
    _, left = psutil.wait_procs(processes, timeout=20)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not left


@pytest.fixture(scope="module")
def reference(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing befell."""
    run = tmp_path_factory.mktemp("reference") / "run"
    finish([*LAUNCHERS["ours"], *words(tiny_base, tiny_rows, run)])
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_nothing_trains_on_and_the_same_command_goes_on(
    name: str, reference: Path, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [*LAUNCHERS[name], *words(tiny_base, tiny_rows, run)]
    below = kill_at_step(start(command), run, 30)
    again = start(command)  # at once, while the others are still ending
    assert_gone(below)
    assert all(entry["step"] < 100 for entry in log(run)), "no further steps"
    said = again.communicate(timeout=400)[0]
    assert again.returncode == 0, said
    assert "going on from" in said
    assert learnt(run) == learnt(reference), "each step is logged once, with the very numbers"
    assert results(run) == results(reference)


def test_the_workers_of_a_killed_launcher_are_gone(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    """As the slow one, without the runs before and after."""
    run = tmp_path / "run"
    launcher = start([*LAUNCHERS["ours"], *words(tiny_base, tiny_rows, run), "trainer.max_steps=5000"])
    below = kill_at_step(launcher, run, 3)
    assert_gone(below)
    steps = len(log(run))
    time.sleep(1)
    assert len(log(run)) == steps
    assert not (run / "all_results.json").exists()


@pytest.mark.slow
def test_evaluating_and_asking_processes_end_too(tiny_base: Path, tmp_path: Path) -> None:
    """`glmtune eval` under torchrun, with two processes that share the questions."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "glmtune", "eval", "benchmark=ceval", f"model.source={tiny_base}", "model.device=cpu"),
        *("protocol=zero_shot_cot", f"output_dir={tmp_path / 'out'}"),
    ]
    launcher = start(command)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "out").glob("journal-rank*.jsonl"))) < 2:
        if launcher.poll() is not None:
            pytest.skip(
                f"the evaluation was over before it could be killed: {launcher.communicate()[0][-300:]}"
            )
        assert time.monotonic() < deadline
        time.sleep(0.02)
    below = psutil.Process(launcher.pid).children(recursive=True)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert_gone(below)
