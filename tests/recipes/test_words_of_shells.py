"""Words as shells and scripts pass them: terminals that are not UTF-8, and values that scripts hand on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


# Terminals that are not UTF-8.


def run(words: Sequence[str | bytes], **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "glmtune", *words],
        env=os.environ | {"PYTHONPATH": str(REPO)} | environment,
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("encoding", ["gbk", "iso8859-1", "ascii"])
def test_characters_that_a_terminal_lacks(encoding: str) -> None:
    for words in (["train", "data.source_prefix=问题é😀", "--cfg"], ["train", "data=客服é😀"]):
        done = run(words, PYTHONIOENCODING=encoding)
        assert done.returncode == (0 if "--cfg" in words else 2), done.stderr
        assert b"Traceback" not in done.stderr
        assert b"\\U0001f600" in done.stdout + done.stderr, "what it cannot show is written as a number"


def test_bytes_that_are_no_text() -> None:
    done = run(["train", b"data.train_file=\xb2\xe2.json", "--cfg"], PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    done = run(["train", b"output_dir=\xb2\xe2", "--cfg"], PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    done = run(["train", b"output_dir=\xb2\xe2"], PYTHONUTF8="1")
    assert done.returncode == 2, done.stderr
    assert (
        b"`output_dir` is `\\udcb2\\udce2`, but model files are only opened under names in UTF-8"
        in done.stderr
    )


@pytest.fixture(scope="module")
def gbk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A locale in GBK, made where the system has the sources of one."""
    if shutil.which("localedef") is None:
        pytest.skip("no localedef on this machine")
    folder = tmp_path_factory.mktemp("locale")
    subprocess.run(
        ["localedef", "-i", "zh_CN", "-f", "GBK", str(folder / "zh_CN.GBK")], capture_output=True, check=False
    )
    if not (folder / "zh_CN.GBK").is_dir():
        pytest.skip("no sources of zh_CN.GBK on this machine")
    return {"LOCPATH": str(folder), "LC_ALL": "zh_CN.GBK", "PYTHONUTF8": "0"}


def test_a_locale_in_gbk(gbk: dict[str, str]) -> None:
    done = run(["train", "data=客服".encode("gbk")], **gbk)
    assert done.returncode == 2, done.stderr
    assert "`data` is `客服`" in done.stderr.decode("gbk")
    done = run(["train", "output_dir=输出".encode("gbk")], **gbk)
    assert done.returncode == 2, done.stderr
    assert "`output_dir` is `输出`" in done.stderr.decode("gbk")
    done = run(["train", "data.prompt_column=问题".encode("gbk"), "--cfg"], **gbk)
    assert "prompt_column: 问题" in done.stdout.decode("gbk")


# Scripts.


@pytest.mark.parametrize(
    "value", ["客服数据/x.jsonl", "a (1).json", "it's.json", "a,b.jsonl", "$x`y`.json", 'a"b" *.json']
)
def test_scripts_pass_values_unharmed(value: str, tmp_path: Path) -> None:
    for program in ("glmtune", "torchrun", "nvidia-smi"):
        (tmp_path / program).write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
        (tmp_path / program).chmod(0o755)
    clean = {
        name: text for name, text in os.environ.items() if name not in ("LR", "MODEL", "NUM_GPUS", "DATA")
    }
    variables = {
        "DATA": value,
        "CHAT_TRAIN_DATA": value,
        "MODEL": value,
        "OUTPUT_DIR": value,
        "NUM_GPUS": "1",
    }
    variables |= {"CHECKPOINT_NAME": value, "CHAT_VAL_DATA": value, "HOSTFILE": value, "PRE_SEQ_LEN": "4"}
    expected = {
        "train_ptuning.sh": ("data", "model.source", "output_dir"),
        "train_chat.sh": ("data.train_file", "data.validation_file", "model.source", "output_dir"),
        "ds_train_finetune.sh": ("data", "model.source", "output_dir", "launch.hostfile"),
    }
    for script, settings_ in expected.items():
        done = subprocess.run(
            ["bash", str(REPO / "scripts" / script), f"data.source_prefix={value}"],
            env=clean | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert {f"<{setting}={value}>" for setting in (*settings_, "data.source_prefix")} <= set(lines)
