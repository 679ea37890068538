"""`scripts/gpu_check.sh`: its dry run works, and nothing that befalls a part takes the report of the others away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.gpu import check as check_module
from benchmarks.gpu.check import Check, main, run_all
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.report import TUNE_PUBLISHED, file_name
from tests.conftest import REPO

PROGRAM = "tests.gpu.programs"


def part(name: str, way: str, *, seconds: int = 100, why_not: str = "") -> Part:
    return Part(name, "decode", PROGRAM, (way,), seconds, why_not=lambda: why_not)


def check(folder: Path, *, seconds: float = 300) -> Check:
    return Check(
        "cuda", False, time.monotonic() + seconds, folder, {"card": "Some Card (80 GB)", "torch": "2.13"}
    )


def test_a_dry_run_does_everything(tmp_path: Path) -> None:
    words = ["bash", "scripts/gpu_check.sh", "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(words, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = (tmp_path / "cpu-dry-run.md").read_text()
    assert ", complete; random weights" in report
    for each in PARTS:
        assert f"{each.name}:" in done.stdout
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    assert sum(row.endswith("| done |") for row in rows) >= len(PARTS) - 2
    _, _, rest = report.partition("## Not measured")
    for line in rest.splitlines():
        assert not line.startswith("-") or "is not installed" in line  # bitsandbytes, torchao


def test_what_fails_or_hangs_is_reported_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "LEAST_SECONDS", 5)
    parts = [
        part("raising", "raises"),
        part("failing", "fails"),
        part("hanging", "hangs", seconds=8),
        part("absent", "ends", why_not="bitsandbytes is not installed"),
        part("last", "ends"),
    ]
    run = check(tmp_path)
    run_all(run, parts, tmp_path)
    states = {name: found.state for name, found in run.outcomes.items()}
    assert states == {
        "raising": "failed",
        "failing": "failed",
        "hanging": "too slow",
        "absent": "skipped",
        "last": "done",
    }
    report = (tmp_path / "some-card-80-gb.md").read_text()
    assert "ValueError: no such kernel" in report
    assert "failing: failed, exit code 3" in report
    assert "hanging: too slow, stopped after its 8 seconds" in report
    assert "absent: skipped, bitsandbytes is not installed" in report
    assert report.count("| 12.5 |") == 4, "figures of parts that ended badly count, too"
    assert "    this one hangs" in capsys.readouterr().out


def test_the_time_of_everything_ends(tmp_path: Path) -> None:
    run = check(tmp_path, seconds=3)
    run_all(run, [part("late", "ends")], tmp_path)
    assert run.outcomes["late"].state == "not run"
    assert "late: not run, the time of the whole check was over" in run.report.read_text()


def test_stopped_half_way_there_is_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (part("first", "ends"), part("second", "hangs"), part("third", "ends"))
    monkeypatch.setattr(check_module, "PARTS", parts)
    monkeypatch.setattr(check_module, "MACHINE", part("machine", "ends"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.sh", "--out", str(tmp_path)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    file = tmp_path / "unknown.md"

    def stop_in_the_second() -> None:
        for _ in range(600):
            if file.is_file() and "| first | 12.5" in file.read_text():
                break
            time.sleep(0.1)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_in_the_second, daemon=True).start()
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stopped.value.code == 128 + signal.SIGTERM
    report = file.read_text()
    assert "stopped before its end" in report
    assert "second: stopped" in report
    assert "third: not run" in report


def test_what_starts_the_parts_imports_no_torch() -> None:
    """Each process that it spawns on a GPU would import it again, before it knows what it is for."""
    code = "import sys, benchmarks.gpu.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


def test_published_figures_are_those_of_the_file() -> None:
    reports = yaml.safe_load((REPO / "benchmarks" / "published.yaml").read_text())
    found = {
        (model, row["tune"], row["quantization"]): row["gib"] for row in reports for model in row["models"]
    }
    assert found[TUNE_PUBLISHED["tune-ptuning-int4"]] == 6.7
    assert set(TUNE_PUBLISHED) <= {each.name for each in PARTS}
    assert file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.md"


def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    words = ["bash", "scripts/gpu_check.sh", "--out", str(tmp_path)]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(words, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PyTorch sees no CUDA device here" in done.stdout
    assert not list(tmp_path.glob("*.md"))
