"""One writer of a folder: named to whoever comes second, forgotten when it dies, also where flock is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glmtune.errors import ConfigError
from glmtune.storage import holder, lock
from glmtune.storage.holder import Holder
from glmtune.storage.lock import Lock, lock_beside, lock_folder

HOLDER = """
import os, sys, time
from pathlib import Path
from glmtune.storage import lock

with lock.lock_folder(Path(sys.argv[1])):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(600)
    print("held", flush=True)
    time.sleep(600)
"""
LAUNCHER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env={**os.environ, "RANK": "0"})
time.sleep(600)
"""
WORKER = """
import os, sys, time
from pathlib import Path
from glmtune.storage import lock

launcher = os.getppid()  # before anybody hears of us, and may kill it
with lock.lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    while os.getppid() == launcher:
        time.sleep(0.05)
    time.sleep(1)
"""
# What the standard library of Windows offers, as far as the lock uses it.
WINDOWS = """
import os, sys, types, psutil
from pathlib import Path

sys.platform = "win32"
sys.modules["fcntl"] = None
locked = []

def locking(handle, mode, size):
    where = (os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR))
    if where in locked:
        raise PermissionError(13, "Permission denied")
    locked.append(where)
    assert (mode, size) == (2, 1)

sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
from glmtune.errors import ConfigError
from glmtune.storage import lock

lock.PATIENCE_SECONDS = 0
folder = Path(sys.argv[1])
with lock.lock_folder(folder):
    assert [byte for _, byte in locked] == [lock.LOCKED_BYTE]
    try:
        lock.lock_folder(folder)
    except ConfigError as error:
        print(error)
"""


@contextlib.contextmanager
def another(folder: Path, *words: str):
    """Another process that holds a folder until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *words], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def foreign(**changes) -> Holder:
    values = Holder("elsewhere", 7, time.time() - 60, "glmtune train", "another boot", "a token")
    return dataclasses.replace(values, **changes)


def put(folder: Path, holder: Holder, age: float = 0.0) -> Path:
    """Leave a lock file as a process of another machine would, last refreshed so long ago."""
    path = folder / lock.FOLDER_LOCK
    path.write_text(json.dumps(dataclasses.asdict(holder)), encoding="utf-8")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def holder_of(folder: Path) -> int:
    """Process that the lock file of a folder names."""
    return json.loads((folder / lock.FOLDER_LOCK).read_text(encoding="utf-8"))["pid"]


@pytest.fixture
def on_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose locks other machines may not see, and a lease that a test can wait for."""
    monkeypatch.setattr(lock, "_is_local", lambda path: False)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.3)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch, on_network: None) -> None:
    def none(handle: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_try_lock", none)


def test_the_second_is_refused_by_name_until_the_first_is_killed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
    with another(tmp_path) as holder:
        words = (
            rf"is being written by another process \(process {holder.pid} on {socket.gethostname()}, since "
        )
        with pytest.raises(ConfigError, match=words + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d: -c\)"):
            lock_folder(tmp_path)
        holder.kill()
        began = time.monotonic()
        with lock_folder(tmp_path):  # at once, while the kernel may still be ending the other
            assert time.monotonic() - began < 3


def test_one_that_is_ending_is_waited_for_longer(tmp_path: Path, monkeypatch, caplog) -> None:
    """A worker whose launcher was killed, before it has noticed: here it takes its time."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER, str(tmp_path)], stdout=subprocess.PIPE
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="is being written by another process"):
            lock_folder(tmp_path)
        launcher.kill()
        launcher.wait()
        with lock_folder(tmp_path):
            assert "Waiting up to 60 seconds" in caplog.text


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    """As a data loader's workers, which outlive a killed parent by seconds."""
    with another(tmp_path, "fork") as holder:
        holder.kill()
        holder.wait()
        with lock_folder(tmp_path):
            assert holder_of(tmp_path) == os.getpid()


def test_a_child_that_ends_leaves_the_parents_lock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    with lock_folder(tmp_path) as held:
        if (child := os.fork()) == 0:
            held.release()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            lock_folder(tmp_path)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "new"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [lock.FOLDER_LOCK]
    with lock_folder(tmp_path / "kept"):
        (tmp_path / "kept" / "file").touch()
    with lock_beside(tmp_path / "model"):
        assert (tmp_path / ".model.lock").is_file()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "kept"]


def test_a_lock_of_a_removed_file_is_none(tmp_path: Path, monkeypatch) -> None:
    """Who opened the file before its holder removed it locks what nobody else will ever open."""
    path = tmp_path / ".lock"
    first = Lock(path, guards=tmp_path)
    opened = os.open

    def late(name, *rest):
        handle = opened(name, *rest)
        if name == path:
            monkeypatch.setattr(os, "open", opened)
            first.release()
        return handle

    monkeypatch.setattr(os, "open", late)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    with Lock(path, guards=tmp_path):
        assert path.is_file()
        with pytest.raises(ConfigError, match="another process"):
            Lock(path, guards=tmp_path)


def test_a_folder_moved_away_does_not_lose_its_successor_the_lock(tmp_path: Path) -> None:
    first = lock_folder(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    with lock_folder(tmp_path / "run") as second:
        first.release()
        assert second.path.is_file()


def test_what_is_no_folder_or_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="which is a file, but it must be a folder"):
        lock_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot be written|which is a file"):
        lock_beside(tmp_path / "file" / "below" / "model")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b'{"pid": 1}', b"x" * 10_000, b"[" * 100_000, b'{"started": 1e99}']
)
def test_whatever_lies_there_can_be_locked(content: bytes, tmp_path: Path) -> None:
    (tmp_path / lock.FOLDER_LOCK).write_bytes(content)
    with lock_folder(tmp_path):
        assert holder_of(tmp_path) == os.getpid()


def test_a_holder_cannot_command_the_terminal() -> None:
    said = str(foreign(host="\x1b]52;c;aGk=\x07", command="glm\x1b[2Jtune\n"))
    assert said.isprintable()


# ---- where other machines write the same folder ----


def test_a_stale_lease_of_another_machine_is_taken_at_once(tmp_path: Path, on_network: None, caplog) -> None:
    put(tmp_path, foreign(), age=100)
    with lock_folder(tmp_path):
        pass
    assert "Waiting" not in caplog.text


def test_a_fresh_lease_is_waited_for_and_taken_if_nobody_refreshes_it(tmp_path, on_network, caplog) -> None:
    put(tmp_path, foreign())
    began = time.monotonic()
    with lock_folder(tmp_path):
        assert 1 < time.monotonic() - began < 20
    assert "is held by process 7 on elsewhere, since" in caplog.text


def test_a_lease_that_is_refreshed_is_refused_by_name(tmp_path: Path, on_network: None) -> None:
    path = put(tmp_path, foreign())
    beats = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.2)",
            path,
        ]
    )
    try:
        with pytest.raises(ConfigError, match=r"process 7 on elsewhere, since .*: glmtune train"):
            lock_folder(tmp_path)
    finally:
        beats.kill()
        beats.wait()


def test_a_kill_on_this_machine_is_not_waited_for(tmp_path: Path, on_network: None, caplog) -> None:
    with another(tmp_path) as holder:
        holder.kill()
        holder.wait()
    with lock_folder(tmp_path):
        pass
    assert "Waiting" not in caplog.text


def test_the_holder_refreshes_its_lease(tmp_path: Path, on_network: None) -> None:
    with lock_folder(tmp_path) as held:
        os.utime(held.path, (0, 0))
        deadline = time.monotonic() + 20
        while held.path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert held.path.read_bytes() == b"", "on a network the file stays, and names nobody"


def test_who_slept_through_his_lease_ends(tmp_path: Path) -> None:
    code = HOLDER.replace(
        "with lock", "lock._is_local = lambda p: False\nlock.HEARTBEAT_SECONDS = 0.1\nwith lock"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        put(tmp_path, foreign())
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert b"was taken over by process 7 on elsewhere" in said


# ---- where there are no locks at all ----


def test_without_flock_the_record_decides(tmp_path: Path, no_flock: None, caplog) -> None:
    with lock_folder(tmp_path):
        assert "files cannot be locked here (No locks available)" in caplog.text
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            lock_folder(tmp_path)
    with lock_folder(tmp_path):
        pass


def test_without_flock_a_process_that_is_gone_holds_nothing(tmp_path: Path, no_flock: None) -> None:
    here = {"host": socket.gethostname(), "machine": holder.this_machine()}
    put(tmp_path, foreign(**here, pid=os.getpid(), started=1.0))  # its number was given to another since
    with lock_folder(tmp_path):
        assert holder_of(tmp_path) == os.getpid()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    put(tmp_path, foreign(**here, pid=ended.pid))
    with lock_folder(tmp_path):
        assert holder_of(tmp_path) == os.getpid()


def test_without_flock_the_last_of_two_starters_wins(tmp_path: Path, no_flock: None, monkeypatch) -> None:
    slept = time.sleep

    def meanwhile(seconds: float) -> None:
        if seconds == lock.SETTLE_SECONDS:
            put(tmp_path, foreign())
        slept(seconds)

    monkeypatch.setattr(time, "sleep", meanwhile)
    with pytest.raises(ConfigError, match="process 7 on elsewhere"):
        lock_folder(tmp_path)


def test_a_file_that_may_not_be_written_is_locked_unsigned(tmp_path: Path, monkeypatch) -> None:
    path = put(tmp_path, foreign())
    opened = os.open

    def refused(name, flags, *rest):
        if name == path and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(name, flags, *rest)

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    with lock_folder(tmp_path), pytest.raises(ConfigError, match="another process"):
        lock_folder(tmp_path)


def test_windows_locks_a_byte_behind_the_text(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is being written by another process (process " in done.stdout
