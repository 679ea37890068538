"""The command that measures a trial's metric, where its training has not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.command_line import model_words
from glmtune.data.settings import DataSettings
from glmtune.sweep.metrics import Metric
from glmtune.sweep.trials import Trial

TUNED = {"prefix": "prefix_path", "lora": "adapter_path"}
NOT_OF_PREDICT = (
    *("packing", "packing_length", "cache", "cache_dir", "num_workers", "max_train_samples"),
    *("streaming", "shuffle_buffer", "mix"),
)
"""Settings of a run's data that say nothing of the rows it is evaluated on, or are none of `predict`."""


@dataclass(frozen=True)
class Score:
    """The command that measures a trial's metric, where its training does not.

    Attributes:
        words: of the command.
        folder: where it writes what is read.
    """

    words: tuple[str, ...]
    folder: Path


def score_command(trial: Trial, metric: Metric, words: Sequence[str], folder: Path) -> Score:
    """Word the command that measures a trial as it ended: on the rows it was evaluated on, or a benchmark.

    Args:
        trial: trained.
        metric: of ``predict`` or ``eval``.
        words: further ones of the command.
        folder: of the scores of all trials.
    """
    tune, model = trial.settings["tune"], trial.settings["model"]
    tuned = {"model": trial.folder / "last"} if tune == "full" else {TUNED[tune]: trial.folder}
    named = tuned if tune == "full" else {**tuned, **model_words(model)}
    own = [f"{name}={value}" for name, value in named.items() if value is not None]
    if metric.command == "predict":
        own += [*_data_words(trial.settings["data"]), "split=validation"]
    else:
        own.append(f"benchmark={metric.name}")
    place = folder / trial.name / Path(metric.name).stem
    return Score((metric.command, *own, *words, f"output_dir={place}"), place)


def _data_words(data: Mapping[str, Any]) -> list[str]:
    """Return the settings by which `predict` reads the rows that the run was evaluated on."""
    default = dataclasses.asdict(DataSettings())
    given = [name for name in data if name not in NOT_OF_PREDICT and data[name] != default.get(name)]
    return ["data=files", *(f"data.{name}={'null' if data[name] is None else data[name]}" for name in given)]
