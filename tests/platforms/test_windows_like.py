"""On a Python without fcntl, fork, signals of Unix and renames of open files everything runs all the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from glmtune.errors import ConfigError
from glmtune.storage.names import portable_name
from glmtune.training.distributed import hosts
from glmtune.training.distributed.launch import LaunchSettings
from tests.platforms.conftest import REPO, WINDOWS_LIKE, Run

PROBE = """
import multiprocessing, os, signal, tempfile
from pathlib import Path

for name in ("fcntl", "resource", "termios", "pwd"):
    try:
        exec(f"import {name}", {"__name__": "glmtune.probe"})
    except ImportError:
        continue
    raise SystemExit(f"{name} is still there")
assert not any(hasattr(os, name) for name in ("fork", "setsid", "geteuid"))
assert not hasattr(signal, "SIGHUP")
assert multiprocessing.get_start_method() == "spawn"
with tempfile.TemporaryDirectory() as place:
    file = Path(place, "file")
    with file.open("w", encoding="utf-8"):
        for step in (file.unlink, lambda: file.replace(file.with_name("new")), lambda: Path(place).rename(place + "-new")):
            try:
                step()
            except PermissionError:
                continue
            raise SystemExit("an open file was renamed or deleted")
    file.replace(file.with_name("new"))
print("as poor as can be")
"""


def test_the_simulation_takes_away_what_it_says(windows_like: Run) -> None:
    done = windows_like("-c", PROBE)
    assert done.stdout == "as poor as can be\n", done.stderr


def test_a_session(windows_like: Run, tmp_path: Path) -> None:
    done = windows_like(WINDOWS_LIKE / "session.py")
    codes = [json.loads(line[3:]) for line in done.stdout.splitlines() if line.startswith("== ")]
    assert done.returncode == 0, (codes, done.stdout[-1500:], done.stderr[-3000:])
    assert [name for name, _ in codes] == ["train"] * 2 + ["predict"] + ["quantize"] * 2 + ["eval"] * 3 + [
        "compare"
    ]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs" / "ads" / "previous" / "1" / "last").is_dir(), "the run before was set aside"
    answers = (tmp_path / "runs/ads/predict/generated_predictions.jsonl").read_text(encoding="utf-8")
    assert len(answers.splitlines()) == 2
    assert list((tmp_path / "rows").glob("*/rows.arrow")), "two spawned processes have encoded the rows"
    assert (tmp_path / "runs" / "int4" / "earlier-1").is_dir()
    # What nobody writes any more has its name, and each name could be one on Windows.
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    assert [path for path in made if path.name.endswith((".partial", ".replaced", ".part"))] == []
    assert [path for path in made if portable_name(path.name) != path.name] == []


def test_a_folder_is_kept_from_a_second_run(windows_like: Run, tmp_path: Path) -> None:
    """Where there are no locks at all the record in the file decides, and is believed within a second."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom glmtune.errors import ConfigError\nfrom glmtune.storage import lock\n"
        "lock.PATIENCE_SECONDS = 0\n"
        "with lock.lock_folder(Path('run')):\n"
        "    try:\n        lock.lock_folder(Path('run'))\n"
        "    except ConfigError as error:\n        print(error)\n"
        "with lock.lock_folder(Path('run')):\n    print('free again')\n"
    )
    done = windows_like("-c", code)
    assert done.returncode == 0, done.stderr
    assert re.search(r"run is being written by another process \(process \d+ on ", done.stdout)
    assert done.stdout.endswith("free again\n")
    assert "files cannot be locked here" in done.stderr


def wait_until_ready(opener: urllib.request.OpenerDirector, url: str) -> None:
    """Wait until the model is loaded: the address is said before."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with opener.open(f"{url}/health", timeout=10):
                return
        except urllib.error.HTTPError:
            time.sleep(0.1)
        assert time.monotonic() < deadline


def test_a_server(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(WINDOWS_LIKE), str(REPO)]),
        "PYTHONWARNDEFAULTENCODING": "1",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "glmtune", "serve", "port=0", "model.device=cpu"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as server:
        try:
            assert server.stdout is not None
            said: list[str] = []
            address = None
            while address is None:
                line = server.stdout.readline()
                assert line, "".join(said)
                said.append(line)
                address = re.search(r"http://127\.0\.0\.1:\d+", line)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            wait_until_ready(opener, address[0])
            body = {"messages": [{"role": "user", "content": "12+30"}], "temperature": 0, "max_tokens": 64}
            request = urllib.request.Request(
                f"{address[0]}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with opener.open(request, timeout=120) as reply:
                assert "42" in json.load(reply)["choices"][0]["message"]["content"]
        finally:
            server.terminate()
        rest = server.communicate(timeout=60)[0]
        assert server.returncode == 0, rest
        assert "Traceback" not in "".join(said) + rest


def test_a_hostfile_is_refused_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "os", SimpleNamespace(name="nt"))
    settings = LaunchSettings(hostfile="hosts")
    with pytest.raises(
        ConfigError, match=r"`launch.hostfile` is `hosts`, but .* and this is Windows\. Start each"
    ):
        hosts.launch_on_hosts("train", {}, settings)


SIGNALS = """
import signal
killed = signal.SIGKILL
del signal.SIGKILL  # as on Windows; here PyTorch needs it

from glmtune.signals import stopping_signals
from glmtune.training.distributed import launch

signal.SIGKILL = killed
from torch.distributed.launcher.api import LaunchConfig

assert launch.KILLED == 9
assert stopping_signals() == (signal.SIGTERM,)
print(launch._signals_passed_on(LaunchConfig)["signals_to_handle"])
"""


def test_signals_that_are_not_there(windows_like: Run) -> None:
    """The launcher names the signals that it passes on, and judges what ended its processes."""
    done = windows_like("-c", SIGNALS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "SIGTERM,SIGINT\n"
