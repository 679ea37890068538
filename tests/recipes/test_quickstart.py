"""`glmtune quickstart`: three commands in processes of their own; the first that fails ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glmtune.cli import main


@pytest.mark.parametrize(("failing", "expected"), [(None, 0), ("train", 3)])
def test_what_is_run(
    failing: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        ran.append(command)
        return SimpleNamespace(returncode=3 if command[3] == failing else 0)

    monkeypatch.setattr(subprocess, "run", run)
    place = tmp_path / "a folder"
    assert main(["quickstart", f"output_dir={place}", "trainer.max_steps=3"]) == expected
    assert all(command[:3] == [sys.executable, "-m", "glmtune"] for command in ran)
    assert ran[1][3:] == [
        "train",
        "+recipe=ptuning",
        "data=ads",
        f"output_dir={place}",
        "trainer.max_steps=3",
    ]
    assert [command[3] for command in ran] == ["data", "train", "predict"][: 2 if failing else 3]
    if failing is None:
        assert ran[2][4:] == ["data=ads", f"prefix_path={place / 'last'}", "compare_base=true"]


@pytest.mark.parametrize(
    "word", ["model=chatglm2-6b", "quantization=int4", "data=chat", "data.train_file=my.jsonl"]
)
def test_what_the_next_commands_would_not_know_is_refused(
    word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert main(["quickstart", word]) == 2
    assert "use `glmtune train`" in capsys.readouterr().err
