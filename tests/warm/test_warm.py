"""A fork of the warm process is what a new process would be."""

from __future__ import annotations

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

from tests.warm.start import warm_folder, warm_python

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux forks from a warm process")
FACTS = """
import json, numpy, os, random, sys, torch
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "name": __name__, "input": sys.stdin.read(),
    "given": os.environ.get("GLMTUNE_GIVEN"), "parent": os.getppid(), "leads": os.getsid(0) == os.getpid(),
    "seeds": [torch.initial_seed(), random.random(), numpy.random.rand()], "encodings": [sys.stdout.encoding, sys.stderr.errors],
}))
"""


def run(*words: str, python: list[str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(python or warm_python()), *words], capture_output=True, text=True, check=False, **options
    )


def test_words_folder_variables_streams(tmp_path: Path) -> None:
    found = []
    for python in ([sys.executable], warm_python(), warm_python()):
        variables = {**os.environ, "GLMTUNE_GIVEN": "值"}
        done = run("-c", FACTS, "a b", "'", python=python, cwd=tmp_path, env=variables, input="问\n")
        assert (done.returncode, done.stderr) == (0, "")
        found.append(json.loads(done.stdout))
    new, warm, again = found
    seeds = [each.pop("seeds") for each in found]
    assert all(len(set(drawn)) == 3 for drawn in zip(*seeds, strict=True)), "each draws its own numbers"
    assert warm.pop("parent") == again.pop("parent") != new.pop("parent") == os.getpid()
    assert warm.pop("leads") is again.pop("leads") is True
    new.pop("leads")
    assert warm == again == new
    assert warm["given"] == "值"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('why')", 1),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import atexit, threading; atexit.register(print, 'b'); threading.Thread(target=print, args=['a']).start()", 0),
    ],
)  # fmt: skip
def test_how_it_ends(code: str, expected: int) -> None:
    new, warm = run("-c", code, python=[sys.executable]), run("-c", code)
    assert warm.returncode == new.returncode == expected
    assert warm.stdout == new.stdout
    assert warm.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_the_command_and_its_place_on_the_path(tmp_path: Path) -> None:
    new = run("-m", "glmtune", "info", "glm-tiny", cwd=tmp_path, python=[sys.executable])
    warm = run("-m", "glmtune", "info", "glm-tiny", cwd=tmp_path)
    found = run("info", "glm-tiny", python=[str(warm_folder() / "glmtune")], cwd=tmp_path)
    assert new.stdout == warm.stdout == found.stdout
    assert new.returncode == warm.returncode == found.returncode == 0
    refused = run("-m", "glmtune", "tran", cwd=tmp_path)
    assert refused.returncode == 2
    assert "Did you mean `train`" in refused.stderr


def test_signals_go_on_and_a_killed_one_is_gone(tmp_path: Path) -> None:
    code = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
pathlib.Path("begun").write_text(str(os.getpid()))
time.sleep(60)
"""
    for number, expected in ((signal.SIGTERM, 7), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGKILL, -9)):
        begun = tmp_path / "begun"
        begun.unlink(missing_ok=True)
        with subprocess.Popen([*warm_python(), "-c", code], cwd=tmp_path) as process:
            while not (begun.exists() and begun.read_text()):
                time.sleep(0.01)
            fork = int(begun.read_text())
            process.send_signal(number)
            assert process.wait(30) == expected
        for _ in range(3000):
            if not psutil.pid_exists(fork):
                break
            time.sleep(0.01)
        assert not psutil.pid_exists(fork)


def test_what_imports_would_have_read_makes_a_new_process() -> None:
    code = "import os; print(os.getppid())"
    for variables, python, is_new in (
        ({"GLMTUNE_API_KEY": "x"}, warm_python(), False),
        ({"HF_HOME": "/nowhere"}, warm_python(), True),
        ({"HOME": "/nowhere"}, warm_python(), True),
        ({"HOME": "/nowhere"}, warm_python("HOME"), False),
        ({"PYTHONPATH": "/nowhere"}, warm_python(), True),
    ):
        done = run("-c", code, python=python, env={**os.environ, **variables})
        assert (done.stdout == f"{os.getpid()}\n") == is_new, variables
    done = run("-I", "-c", code)
    assert done.stdout == f"{os.getpid()}\n", "other options are those of a new one"
