"""`glmtune quickstart`: check the shipped data, tune the embedded model on it, predict before and after."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from glmtune.errors import ConfigError
from glmtune.models.settings import ModelSettings
from glmtune.terminal.text import write_now
from glmtune.training.config import RunConfig
from recipes.words.compose import Command

ADS = "shipped:ads/train.jsonl"


def run(config: RunConfig, words: Sequence[str] = ()) -> int:
    """Run the three commands one after the other, as whoever learns them would type them.

    Args:
        config: of the training; of it only the folder is read here.
        words: overrides as they were typed, for the training.

    Returns:
        The exit code: 0, or that of the first command that failed.

    Raises:
        ConfigError: another model, other data or another method than those of the quickstart.
    """
    # Checked rather than passed on to all three: each command names model and data in words of its own.
    given = {"model": config.model, "data.train_file": config.data.train_file, "tune": config.tune}
    if given != {"model": ModelSettings(), "data.train_file": ADS, "tune": "prefix"}:
        raise ConfigError(
            "The quickstart tunes a prefix of the embedded model on the shipped data, and nothing else. For "
            "other models, data and methods use `glmtune train`, which says what to type next."
        )
    folder = Path(config.output_dir)
    typed = [word for word in words if not word.startswith("output_dir=")]
    commands = (
        ["data", "check", "data=ads"],
        ["train", "+recipe=ptuning", "data=ads", f"output_dir={folder}", *typed],
        ["predict", "data=ads", f"prefix_path={folder / 'last'}", "compare_base=true"],
    )
    for command in commands:
        # A process for each: none leaves anything behind in memory that the next would not have by itself.
        write_now(f"\n$ {shlex.join(['glmtune', *command])}\n")
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
