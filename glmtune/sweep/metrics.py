"""What may tell the best trial: figures of the run itself, scores of its answers, accuracy on benchmarks."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError, unknown_name

# Name -> (key of the run's all_results.json, whether a larger one is the better one).
OF_RUN = {
    "eval_loss": ("final_eval_loss", False),
    "best_eval_loss": ("best_eval_loss", False),
    "eval_accuracy": ("final_eval_accuracy", True),
    "best_eval_accuracy": ("best_eval_accuracy", True),
    "train_loss": ("train_loss", False),
    "eval_retention": ("final_eval_retention", True),
    "eval_retention_kl": ("final_eval_retention_kl", False),
    "eval_leak_rate": ("final_eval_leak_rate", False),
}


@dataclass(frozen=True)
class Metric:
    """A figure of every trial.

    Attributes:
        name: as in `sweep.metric`.
        command: that measures it: ``train``, ``predict`` or ``eval``.
        is_larger_better: which way is up.
        unit: of its values, for tables.
    """

    name: str
    command: str
    is_larger_better: bool
    unit: str = ""

    @property
    def is_measured_on_rows(self) -> bool:
        """Whether the run needs rows that it does not learn."""
        return self.command == "predict" or (self.command == "train" and "eval" in self.name)


def metric_of(name: str, benchmarks: Collection[str]) -> Metric:
    """Find a metric.

    Args:
        name: as in `sweep.metric`.
        benchmarks: those that `glmtune eval` knows; a YAML file of one's own is one, too.

    Raises:
        ConfigError: there is none of that name.
    """
    from glmtune.metrics.text import METRICS

    if name in OF_RUN:
        return Metric(name, "train", OF_RUN[name][1], "nats" if name.endswith(("loss", "kl")) else "")
    if name in METRICS:
        return Metric(name, "predict", True, "0 to 100")
    if name in benchmarks or name.endswith((".yaml", ".yml")):
        return Metric(name, "eval", True, "%")
    raise ConfigError(unknown_name("`sweep.metric`", name, [*OF_RUN, *METRICS, *benchmarks]))


def figures_of_run(results: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that a finished run has measured itself.

    Args:
        results: content of its ``all_results.json``.
    """
    found = {name: results.get(key) for name, (key, _) in OF_RUN.items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def score_of(metric: Metric, folder: Path) -> float:
    """Read the score of a trial from what `predict` or `eval` left.

    Args:
        metric: measured by one of them.
        folder: theirs.

    Raises:
        ValueError: there is none; why is said.
    """
    name = "predict_results.json" if metric.command == "predict" else "results.json"
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        if metric.command == "predict":
            return float(values["metrics"][metric.name]["value"])
        return 100 * float(values[values["headline"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / name} holds no {metric.name} ({error})") from None
