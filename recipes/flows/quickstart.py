"""`glmtune quickstart`: check the shipped data, tune the embedded model on it, predict before and after."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from glmtune.terminal.text import write_now
from glmtune.training.config import RunConfig
from recipes.words.compose import Command


def run(config: RunConfig, words: Sequence[str] = ()) -> int:
    """Run the three commands one after the other, as whoever learns them would type them.

    Args:
        config: of the training; of it only the folder is read here.
        words: overrides as they were typed, for the training.

    Returns:
        The exit code: 0, or that of the first command that failed.
    """
    folder = Path(config.output_dir)
    typed = [word for word in words if not word.startswith("output_dir=")]
    commands = (
        ["data", "check", "data=ads"],
        ["train", "+recipe=ptuning", "data=ads", f"output_dir={folder}", *typed],
        ["predict", "data=ads", f"prefix_path={folder / 'last'}", "compare_base=true"],
    )
    for command in commands:
        # A process for each: none leaves anything behind in memory that the next would not have by itself.
        write_now(f"\n$ glmtune {' '.join(command)}\n")
        code = subprocess.run([sys.executable, "-m", "glmtune", *command], check=False).returncode  # noqa: S603
        if code:
            return code
    return 0


COMMAND = Command(
    name="quickstart",
    summary="check the shipped data, tune the embedded model on it, predict before and after",
    schema=RunConfig,
    run=run,
    takes_words=True,
    examples=("glmtune quickstart", "glmtune quickstart trainer.max_steps=100"),
)
