"""Processes end with their launcher, however that ends, and with them all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from glmtune.training.distributed import parent

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the processes of these tests are forked")
# A process of a run that has forked a worker (a data loader's), started one by another program, and trains.
PROCESS = """
import os, subprocess, sys, time
sys.argv = ["glmtune"]
{before}
from glmtune.training.distributed import parent
parent.watch()
if os.fork() == 0:
    time.sleep(600)
subprocess.Popen(["sleep", "600"])
os.write(1, b"ready\\n")  # at once: two processes share the pipe, and print may write word and line end apart
{after}
time.sleep(600)
"""
LAUNCHER = """
import os, subprocess, sys, time
os.environ |= {"WORLD_SIZE": "2", **dict(word.split("=") for word in sys.argv[2:])}
for rank in range(2):
    os.environ["RANK"] = str(rank)
    subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
time.sleep(600)
"""
# As a virtual environment on Windows has it: its Python is a small program that starts the real one.
STARTER = """
import os, subprocess, sys, time
os.environ["GLMTUNE_STARTED_BY"] = str(os.getpid())
between = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
subprocess.Popen([sys.executable, "-c", between, sys.argv[1]], start_new_session=True)
time.sleep(600)
"""


@contextlib.contextmanager
def started(*words: str, readies: int = 2) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A launcher, and all processes below it once they are ready."""
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as launcher:
        assert launcher.stdout is not None
        for _ in range(readies):
            assert launcher.stdout.readline() == b"ready\n"
        below = psutil.Process(launcher.pid).children(recursive=True)
        try:
            yield launcher, below
        finally:
            for process in [*below, psutil.Process(launcher.pid)]:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def process(before: str = "", after: str = "") -> str:
    return PROCESS.format(before=before, after=after)


def assert_gone(processes: list[psutil.Process], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while left := [each for each in processes if parent._lives(each)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_killed_launcher_takes_all_with_it() -> None:
    with started("-c", LAUNCHER, process()) as (launcher, below):
        assert len(below) == 6
        time.sleep(3 * parent.POLL_SECONDS)
        assert all(parent._lives(each) for each in below), "while it lives, they do"
        launcher.kill()
        assert_gone(below)


def test_a_program_between_a_starter_and_its_command_hides_neither_from_the_other() -> None:
    with started("-c", STARTER, process(), readies=1) as (starter, below):
        assert len(below) == 4
        time.sleep(3 * parent.POLL_SECONDS)
        assert all(parent._lives(each) for each in below), "while it lives, they do"
        starter.kill()
        assert_gone(below)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells a child of its parent's end")
def test_a_killed_process_takes_its_forks_with_it() -> None:
    """Workers of a data loader or a pool; what other programs it runs is theirs to end."""
    with started("-c", process(), readies=1) as (alone, below):
        forked = [each for each in below if each.name() != "sleep"]
        assert len(forked) == 1
        alone.kill()
        assert_gone(forked)


def test_a_launcher_that_was_killed_before_the_process_could_look() -> None:
    code = "import os\nfrom glmtune.training.distributed import parent\nparent.watch()\nprint('alive')"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    values = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", parent.LAUNCHED: str(ended.pid)}
    done = subprocess.run([sys.executable, "-c", code], env=values, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_who_was_started_by_nobody_outlives_his_shell() -> None:
    """As `nohup glmtune train &` does: only processes of a launcher look up."""
    with started("-c", LAUNCHER.replace('"RANK"', '"OTHER"'), process()) as (launcher, below):
        launcher.kill()
        time.sleep(5 * parent.POLL_SECONDS)
        assert all(parent._lives(each) for each in below)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("/usr/bin/python3.11 /usr/bin/torchrun --nproc-per-node=2 -m glmtune eval", True),
        ("python -u -m deepspeed.launcher.launch --world_info=abc train.py", True),
        ("python -P /x/glmtune/__main__.py train", True),
        ("python -W ignore -m torch.distributed.run -m glmtune train", True),
        ("bash -c torchrun -m glmtune train", False),
        ("python submit.py torchrun", False),
        ("sshd: user@pts/0", False),
        ("python", False),
        ("", False),
    ],
)
def test_which_ancestors_are_launchers(words: str, expected: bool) -> None:
    class Process:
        def cmdline(self) -> list[str]:
            return words.split()

    assert parent._is_launcher(Process()) == expected  # type: ignore[arg-type]


def test_the_chain_goes_up_to_the_topmost_launcher() -> None:
    """`deepspeed` runs `deepspeed.launcher.launch`, which runs a script of the user's, which runs us."""
    chain = ["bash run.sh", "python -u -m deepspeed.launcher.launch", "python /bin/deepspeed", "bash", "sshd"]

    class Process:
        def __init__(self, words: str) -> None:
            self.words, self.pid = words, len(words)

        def cmdline(self) -> list[str]:
            return self.words.split()

    def watched(*above: str, starter: int | None = None) -> list[str]:
        found = parent._launchers([Process(words) for words in above], starter)  # type: ignore[arg-type]
        return [each.words for each in found]  # type: ignore[attr-defined]

    assert watched(*chain) == chain[:3]
    assert watched("bash", "sshd") == ["bash"]
    assert watched("python", "glmtune.exe", "explorer", starter=len("glmtune.exe")) == [
        "python",
        "glmtune.exe",
    ]


HEARD = """
import signal
def stop(*_):
    print("told to stop", flush=True)
    raise SystemExit
signal.signal(signal.SIGTERM, stop)
import os
os.environ["GLMTUNE_HEAD"] = "1"
from glmtune.training.distributed import parent
parent.SILENCE_SECONDS = {seconds}
"""


@pytest.mark.parametrize("way", ["closed", "silent"])
def test_a_part_started_over_ssh_stops_when_the_head_is_gone(way: str) -> None:
    code = process(HEARD.format(seconds=1.5 if way == "silent" else 600))
    with started("-c", code, readies=1) as (part, _):
        assert part.stdin is not None
        assert part.stdout is not None
        for _ in range(3):
            time.sleep(0.3)
            part.stdin.write(b"\n")
            part.stdin.flush()
        assert part.poll() is None
        if way == "closed":
            part.stdin.close()
        assert part.stdout.readline() == b"told to stop\n"
        part.kill()


def test_the_head_speaks_to_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, it leaves its ssh behind; the part notices by the end of what it hears."""
    (tmp_path / "ssh").write_text(
        "#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done\n"
        f"[[ $2 == true ]] && exit\nhead -c 2 > {tmp_path}/heard; cat; touch {tmp_path}/ended\n"
    )
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("node0 slots=1\n")
    code = (
        "import sys\nfrom glmtune.training.distributed import hosts\n"
        "from glmtune.training.distributed.launch import LaunchSettings\nhosts.HEAD_SECONDS = 0.1\n"
        "hosts.launch_on_hosts('train', {'launch': {}}, LaunchSettings(hostfile=sys.argv[1]))"
    )
    values = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "hosts")], env=values) as head:
        deadline = time.monotonic() + 60
        while not (tmp_path / "heard").exists() or (tmp_path / "heard").stat().st_size < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (tmp_path / "heard").read_bytes() == b"\n\n"
        assert not (tmp_path / "ended").exists()
        head.send_signal(signal.SIGKILL)
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
