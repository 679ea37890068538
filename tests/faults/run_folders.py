"""A small run, killed on its way, and what its folder holds: for tests that damage it or start it wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmtune.training.trainer import GlmTrainer
from recipes.train import COMMAND, TrainResult, run
from recipes.words.compose import load_settings

SMALL = [
    "data=files",
    "data.layout=adgen",
    "retention=null",
    "trainer.max_steps=6",
    "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=1",
    "trainer.logging_steps=1",
    "trainer.eval_steps=2",
    "trainer.save_steps=2",
    "trainer.report_to=[]",
]


def command(base: Path, rows: dict[str, Path], folder: Path, *, tune: str = "prefix") -> list[str]:
    """Return the words of the run in a folder."""
    recipe = {"prefix": ["+recipe=ptuning", "prefix.pre_seq_len=4"], "full": ["+recipe=full"]}[tune]
    return [
        *recipe,
        *SMALL,
        f"model.source={base}",
        f"data.train_file={rows['train']}",
        f"data.validation_file={rows['validation']}",
        f"output_dir={folder}",
    ]


def train(words: list[str]) -> TrainResult:
    return run(load_settings(COMMAND, words))


def train_killed(words: list[str], *, in_step: int) -> None:
    """Train until a step, and end there as a process does that is killed: nothing more is written."""
    original = GlmTrainer._get_grad_norm

    def killed(self: GlmTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == in_step - 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GlmTrainer, "_get_grad_norm", killed)
        with pytest.raises(KeyboardInterrupt):
            train(words)


def content(folder: Path) -> dict[str, bytes]:
    """Return every file by its path in the folder, and folders as such; locks, which stay, are left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
        if not path.name.endswith(".lock")
    }
