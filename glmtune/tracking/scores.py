"""The figures of an evaluation, sent to trackers as a run of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError
from glmtune.tracking.services import (
    SENDERS,
    begin_swanlab,
    could_not_start,
    settings_rows,
    use_project,
)

SETTING = "report_to"
BOARD_FOLDER = "runs"


@dataclass(frozen=True, slots=True)
class TrackedScores:
    """What is sent.

    Attributes:
        name: of the run.
        folder: of the evaluation; TensorBoard's files go into ``runs`` in it.
        settings: all settings, nested, as files hold them.
        scores: by step, names with figures; an evaluation that has no steps is step 0.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    scores: Sequence[tuple[int, Mapping[str, float]]]


def send_scores(names: Sequence[str], run: TrackedScores) -> None:
    """Send the figures of an evaluation to trackers, each as a run that is then finished.

    Args:
        names: of trackers, see `glmtune.tracking.services.check_trackers`.
        run: what is sent.

    Raises:
        ConfigError: a tracker cannot start or refuses; the evaluation is written already.
    """
    for name in names:
        try:
            SENDING[name](run)
        except ConfigError:
            raise
        except Exception as error:  # of a package of others, or of the server behind it
            raise could_not_start(name, error, SETTING) from error


def _to_tensorboard(run: TrackedScores) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.folder / BOARD_FOLDER)) as writer:
        writer.add_text("settings", settings_rows(run.settings))
        for step, scores in run.scores:
            for name, value in scores.items():
                writer.add_scalar(name, value, step)


def _to_wandb(run: TrackedScores) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    begun: Any = wandb.init(project=use_project("wandb"), name=run.name)
    SENDERS["wandb"](run.settings)
    for step, scores in run.scores:
        begun.log(dict(scores), step=step)
    begun.finish()


def _to_mlflow(run: TrackedScores) -> None:
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.set_experiment(use_project("mlflow"))
    with mlflow.start_run(run_name=run.name):
        SENDERS["mlflow"](run.settings)
        for step, scores in run.scores:
            mlflow.log_metrics({mlflow_name(name): value for name, value in scores.items()}, step=step)


def _to_swanlab(run: TrackedScores) -> None:
    import swanlab  # pyright: ignore[reportMissingImports]

    begin_swanlab(run.name)
    SENDERS["swanlab"](run.settings)
    for step, scores in run.scores:
        swanlab.log(dict(scores), step=step)
    swanlab.finish()


def mlflow_name(name: str) -> str:
    """Return a name as MLflow takes it: letters, digits, and a few marks.

    >>> mlflow_name("gsm8k/pass@8"), mlflow_name("ceval/STEM (hard)")
    ('gsm8k/pass_at_8', 'ceval/STEM _hard_')
    """
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))


SENDING: dict[str, Callable[[TrackedScores], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "swanlab": _to_swanlab,
}
