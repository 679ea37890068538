"""Journals of answers: one writer at a time, named when another comes, and forgotten when it dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import pytest

from glmtune.errors import ConfigError
from glmtune.storage import lock
from glmtune.storage.journal import Journal, read_journal, refuse_other_run

HOLDER = """
import sys, time
from pathlib import Path
from glmtune.storage import lock
from glmtune.storage.journal import Journal

class Word:
    def __init__(self, word): self.word = word
    def to_line(self): return f'"{self.word}"\\n'

with Journal(Path(sys.argv[1])) as journal:
    journal.append(Word("first"))
    print("held", flush=True)
    time.sleep(600)
"""


@dataclass
class Word:
    word: str

    def to_line(self) -> str:
        return json.dumps(self.word) + "\n"


def read(path):
    content = read_journal(path, json.loads)
    return content.entries, path.stat().st_size - content.num_torn


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


def test_a_second_process_is_refused_with_the_name_of_the_first_until_that_is_killed(
    tmp_path, holder, monkeypatch
):
    path = tmp_path / "j.jsonl"
    words = (
        rf"j\.jsonl is being written by another process \(process {holder.pid} on {socket.gethostname()},"
        r" since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d: -c\): two runs cannot share an `output_dir`"
    )
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
    for _ in range(2):  # being refused does not spoil the name
        with pytest.raises(ConfigError, match=words):
            Journal(path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Journal(path) as journal:
        journal.append(Word("second"))
    assert read(path) == (["first", "second"], len('"first"\n"second"\n'))


def test_the_lock_holds_while_the_journal_is_replaced_and_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
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


def test_a_damaged_line_before_the_last_costs_that_line_and_is_set_aside(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'"a"\n"b\n"c"\n"d')
    with Journal(path) as journal:
        content = journal.repair(json.loads)
        assert content.entries == ["a", "c"]
        damaged, torn = content.notes(path)
        assert re.search(r"j\.jsonl: 1 lines cannot be read \(line 2: .*asked again", damaged)
        assert "(2 bytes" in torn
        journal.append(Word("e"))
    assert path.read_bytes() == b'"a"\n"c"\n"e"\n'
    assert (tmp_path / "j.jsonl.damaged").read_bytes() == b'"b\n'
    with Journal(path) as journal:
        assert journal.repair(json.loads).notes(path) == []


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


def test_no_torch_is_imported():
    code = "import sys, glmtune.storage.journal; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
