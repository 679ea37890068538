"""Journals of answers: one writer at a time, named when another comes, and forgotten when it dies."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import pytest

from glmtune import journal as journal_module
from glmtune.errors import ConfigError, DataError
from glmtune.journal import Journal, read_entries, refuse_other_run

HOLDER = """
import sys, time
from pathlib import Path
from glmtune.journal import Journal

class Word:
    def __init__(self, word): self.word = word
    def to_line(self): return f'"{self.word}"\\n'

with Journal(Path(sys.argv[1])) as journal:
    journal.append(Word("first"))
    print("held", flush=True)
    time.sleep(600)
"""
# What the standard library of Windows offers, as far as the lock uses it.
WINDOWS = """
import os, sys, types
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
from glmtune.journal import LOCKED_BYTE, Journal

path = Path(sys.argv[1])
with Journal(path):
    assert [byte for _, byte in locked] == [LOCKED_BYTE]
    assert (path.parent / f".{path.name}.lock").read_text().startswith(f"process {os.getpid()} on ")
    try:
        Journal(path)
    except ConfigError as error:
        print(error)
"""


@dataclass
class Word:
    word: str

    def to_line(self) -> str:
        return json.dumps(self.word) + "\n"


def read(path):
    return read_entries(path, json.loads, begin_anew="resume=never")


@pytest.fixture
def holder(tmp_path):
    """Another process that writes the journal until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "j.jsonl")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_name_of_the_first_until_that_is_killed(tmp_path, holder):
    path = tmp_path / "j.jsonl"
    words = (
        rf"j\.jsonl is being written by another process \(process {holder.pid} on {socket.gethostname()},"
        r" since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d\): two runs cannot share an `output_dir`"
    )
    for _ in range(2):  # being refused does not spoil the name
        with pytest.raises(ConfigError, match=words):
            Journal(path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Journal(path) as journal:
        journal.append(Word("second"))
    assert read(path) == (["first", "second"], len('"first"\n"second"\n'))


def test_the_lock_holds_while_the_journal_is_replaced_and_moved(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append(Word("b"))
        journal.rewrite([Word("a"), Word("b")])
        journal.append(Word("c"))
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            Journal(path)
        path.rename(tmp_path / "elsewhere.jsonl")
        with pytest.raises(ConfigError, match="written by another process"):
            Journal(path)
    assert read(tmp_path / "elsewhere.jsonl")[0] == ["a", "b", "c"]
    Journal(path).__exit__(None, None, None)


def test_a_damaged_line_before_the_last_says_how_to_begin_anew(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'"a"\n"b\n"c"\n')
    with pytest.raises(DataError, match=r"j\.jsonl, line 2: .*begin anew with `resume=never`"):
        read(path)


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, caplog):
    def no_locks(handle):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal_module, "_try_lock", no_locks)
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append(Word("a"))
    assert read(tmp_path / "j.jsonl")[0] == ["a"]
    assert "files cannot be locked here" in caplog.text
    assert "Start only one" in caplog.text


def test_long_hashes_are_shortened_where_a_run_is_refused(tmp_path):
    there, here = {"sha256": "ab" * 32, "text": "x" * 64}, {"sha256": "cd" * 32, "text": "y" * 64}
    with pytest.raises(ConfigError) as caught:
        refuse_other_run(
            tmp_path / "j", "2 rows", there, here, identity_name="run.json", way_out="Begin anew."
        )
    assert 'j holds 2 rows of another run (sha256: "abababababab..." there, "cdcdcdcdcdcd..." now; ' in str(
        caught.value
    )
    assert f'text: "{"x" * 64}" there' in str(caught.value)


def test_windows_locks_a_byte_behind_the_text(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, str(tmp_path / "j.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "j.jsonl is being written by another process (process " in done.stdout


def test_no_torch_is_imported():
    code = "import sys, glmtune.journal; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
