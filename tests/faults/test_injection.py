"""Faults are injected where they are asked for, whoever writes: else every other test here would prove nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.injection import Fault, library, missing
from tests.faults.meaning import achieved, differences, half_written, leftovers, meaning

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

WRITER = """
import os, shutil
os.mkdir("folder")
with open("folder/a", "wb", buffering=0) as file:
    file.write(b"12345678")
    os.fsync(file.fileno())
os.replace("folder/a", "folder/b")
shutil.copyfile("folder/b", "folder/c")
os.link("folder/b", "folder/d")
os.truncate("folder/c", 2)
print(open("folder/b").read())
shutil.rmtree("folder")
"""
KINDS = ["mkdir", "open", "write", "sync", "rename", "open", "write"]


def run(program: str, folder: Path, fault: Fault) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    variables = fault.environment(folder, folder.with_suffix(".operations"))
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | variables | {"LD_PRELOAD": str(library())},
        capture_output=True,
        text=True,
        check=False,
    )


def kinds(folder: Path) -> list[str]:
    return [line.split()[1] for line in folder.with_suffix(".operations").read_text().splitlines()]


def test_without_a_fault_operations_are_counted_and_nothing_else(tmp_path: Path) -> None:
    done = run(WRITER, tmp_path / "here", Fault())
    assert (done.returncode, done.stdout) == (0, "12345678\n")
    counted = kinds(tmp_path / "here")
    assert counted[: len(KINDS)] == KINDS
    assert {"link", "truncate", "remove"} <= set(counted)
    assert "read" not in counted


def test_a_kill_comes_before_the_operation_and_tears_a_write(tmp_path: Path) -> None:
    at = {kind: KINDS.index(kind) + 1 for kind in ("open", "write", "sync", "rename")}
    done = {kind: run(WRITER, tmp_path / kind, Fault("kill", number)) for kind, number in at.items()}
    assert {each.returncode for each in done.values()} == {-9}
    assert not list((tmp_path / "open" / "folder").iterdir())
    assert (tmp_path / "write" / "folder" / "a").read_bytes() == b"1234"
    assert (tmp_path / "rename" / "folder" / "a").read_bytes() == b"12345678"
    assert kinds(tmp_path / "rename") == KINDS[: at["rename"]]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_is_the_system_s(number: int, tmp_path: Path) -> None:
    done = run(WRITER, tmp_path / "here", Fault(number, 3))
    assert done.returncode == 1
    assert os.strerror(number) in done.stderr


def test_an_error_may_last_and_may_choose(tmp_path: Path) -> None:
    program = """
for name in "abc":
    try:
        open(name, "x").close()
        print("made")
    except OSError as error:
        print(error.errno)
"""
    once = run(program, tmp_path / "once", Fault(errno.ENOSPC, 2))
    lasting = run(program, tmp_path / "lasting", Fault(errno.ENOSPC, 2, lasting=True))
    chosen = run(program, tmp_path / "chosen", Fault(errno.ENOSPC, 1, pattern="c"))
    assert once.stdout.split() == ["made", "28", "made"]
    assert lasting.stdout.split() == ["made", "28", "28"]
    assert chosen.stdout.split() == ["made", "made", "28"]


def test_reading_is_spoilt_too(tmp_path: Path) -> None:
    program = "open('a', 'w').close(); open('a')"
    done = run(program, tmp_path / "here", Fault(errno.EACCES, 1, ops=("read",)))
    assert "Permission denied: 'a'" in done.stderr


def test_writers_that_are_not_python_are_reached(tmp_path: Path) -> None:
    """torch writes in C++, safetensors in Rust."""
    program = """
import torch
from safetensors.torch import save_file
for name, save in (("torch", torch.save), ("safetensors", save_file)):
    try:
        save({"a": torch.ones(9000)}, name)
    except Exception as error:
        print(name, "failed")
"""
    done = run(program, tmp_path / "here", Fault(errno.ENOSPC, 1, ops=("write",), lasting=True))
    assert done.stdout.splitlines() == ["torch failed", "safetensors failed"], done.stderr


def test_only_one_of_several_processes(tmp_path: Path) -> None:
    program = "import os; open('a', 'w').close()"
    assert run(program, tmp_path / "none", Fault("kill", 1, rank=1)).returncode == 0
    assert run(program, tmp_path / "first", Fault("kill", 1)).returncode == -9


def test_what_is_compared(tmp_path: Path) -> None:
    """The judge of all campaigns: it must see a changed digit, and not the clock."""
    for name, loss, rate in (("a", 1.5, 10), ("b", 1.5, 20), ("c", 1.25, 10)):
        (tmp_path / name).mkdir()
        text = f'{{"loss": {loss}, "tokens_per_second": {rate}}}\n'
        (tmp_path / name / "trainer_log.jsonl").write_text(text)
    same = differences(meaning(tmp_path / "a"), meaning(tmp_path / "b"))
    other = differences(meaning(tmp_path / "a"), meaning(tmp_path / "c"))
    assert same == []
    assert other == ['trainer_log.jsonl: line 1: {"loss": 1.5} -> {"loss": 1.25}']
    assert differences(meaning(tmp_path / "a"), {}) == ["trainer_log.jsonl: missing"]


def test_what_is_half_written_or_left_behind(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "checkpoint.json").write_text('{"files": {"optimizer.pt": 7}}')
    (tmp_path / "results.json").write_text('{"score"')
    (tmp_path / ".last.partial").mkdir()
    (tmp_path / "journal-rank0.jsonl").write_bytes('{"index": 0}\n{"答'.encode()[:-1])
    assert [name.partition(":")[0] for name in half_written(tmp_path)] == [
        "checkpoint-2/checkpoint.json",
        "results.json",
    ]
    assert leftovers(tmp_path) == [".last.partial"]
    assert achieved(tmp_path) == {f"newest step in {tmp_path.name}": 2, "answers in journal-rank0.jsonl": 1}
