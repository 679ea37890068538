"""The command itself: help is instant, errors are short, exit codes tell."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import threading

import pytest

import recipes.info
from glmtune.cli import COMMANDS, main


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from glmtune.cli import main; main(['--help']);"
        "[main([name, '--help']) for name in sys.argv[1:]];"
        "heavy = {'torch', 'transformers', 'hydra', 'datasets', 'jieba', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *COMMANDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: glmtune {name}")
    assert "settings (default):" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tran"], ["Command is `tran`", "Did you mean `train`"]),
        (["train", "--speed=3"], ["`--speed` is no option", "`speed` is no setting of `glmtune train`"]),
        (["train", "pruning"], ["`pruning` is no override"]),
        (["train", "--fast"], ["`--fast` is no option"]),
        (["train", "--config-dir", "/no/such/folder"], ["/no/such/folder", "existing folder"]),
    ],
)
def test_wrong_usage(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_debug_shows_the_trace() -> None:
    with pytest.raises(Exception, match="does not exist"):
        main(["train", "+recipe=nothing", "--debug"])


def test_a_thread_that_fails_prints_no_stack_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TensorBoard's does on a full disk."""

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def run(_: object) -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    command = dataclasses.replace(recipes.info.COMMAND, run=run)
    monkeypatch.setattr(recipes.info, "COMMAND", command)
    before = threading.excepthook
    assert main(["info"]) == 0
    said = capsys.readouterr().err
    assert "failed: [Errno 28] No space left on device" in said
    assert "Traceback" not in said
    assert threading.excepthook is before


def test_cfg_prints_the_composed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "+recipe=ptuning", "--cfg"]) == 0
    assert "pre_seq_len" in capsys.readouterr().out


def test_own_config_folder(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 7\n")
    assert main(["train", "+recipe=mine", "--config-dir", str(tmp_path), "--cfg"]) == 0
    assert "max_steps: 7" in capsys.readouterr().out


def test_deepspeed_is_heard_only_in_errors(capsys: pytest.CaptureFixture[str]) -> None:
    main(["nothing"])
    logger = logging.getLogger("DeepSpeed")
    record = logger.makeRecord("DeepSpeed", logging.WARNING, "", 0, "no GPU", (), None)
    assert not logger.filter(record)
    record.levelno = logging.ERROR
    assert logger.filter(record)
