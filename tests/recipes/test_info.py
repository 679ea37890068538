"""`glmtune info` says what is there, from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmtune.cli import main
from glmtune.models.load import load_base
from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_machine_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch", torch.__version__, "cores", "chatglm2-6b", "glm-tiny"))


def test_checkpoint(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tiny_base)]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("chatglm2", "parameters", "layers", "weight files"))


def test_prefix(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_base(tiny_base, dtype=torch.float32)
    encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=7))
    save_prefix(encoder, tmp_path, meta=PrefixMeta(base_source="the-base", template="chatglm2"))
    assert main(["info", f"prefix_path={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("pre_seq_len" in line and "7" in line for line in lines)
    assert any("base " in line and "the-base" in line for line in lines)


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
