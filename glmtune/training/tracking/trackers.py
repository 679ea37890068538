"""TensorBoard, W&B, MLflow and SwanLab: each gets the run's name, all its settings, and what was trained on.

transformers' callbacks do the sending. By themselves they know `TrainingArguments` and the model's
configuration only: no prefix, no data. Ours go with them when they have started, so that a run can be found
by what decided it. Settings are sent as files hold them: what comes from the environment stays a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.tracking.services import (
    PROJECT_VARIABLES,
    SENDERS,
    begin_swanlab,
    could_not_start,
    settings_rows,
    use_project,
)


def tracker_callbacks(
    names: Sequence[str], settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[TrainerCallback]:
    """Return the callbacks of trackers other than TensorBoard (see `RunBoard`).

    Args:
        names: as in ``trainer.report_to``.
        settings: all settings, nested, as files hold them.
        facts: about the run: rows, parameters, fingerprints.
    """
    callbacks: list[TrainerCallback] = []
    for name in names:
        if name != "tensorboard":
            if name in PROJECT_VARIABLES:
                use_project(name)
            callback: Any = get_reporting_integration_callbacks([name])[0]()
            callback.setup = _with_settings(name, callback.setup, {**settings, "run": dict(facts)})
            callbacks.append(callback)
    return callbacks


def _with_settings(
    name: str, setup: Callable[..., None], settings: Mapping[str, Any]
) -> Callable[[TrainingArguments, TrainerState, Any], None]:
    """Let the start of a tracker be followed by the settings, and fail in words.

    ``setup`` is where transformers' callbacks start their run (4.40 to 5): once, in each process.
    """

    def start(args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        try:
            if name == "swanlab" and state.is_world_process_zero:
                begin_swanlab(args.run_name)
            setup(args, state, model, **kwargs)
            if state.is_world_process_zero:
                SENDERS[name](settings)
        except Exception as error:  # of a package of others, or of the server behind it
            raise could_not_start(name, error, "trainer.report_to") from error

    return start


class RunBoard(TensorBoardCallback):
    """Writes to ``runs/`` from the moment at which training begins: nothing is touched before."""

    def __init__(self, run: Path, settings: Mapping[str, Any] | None = None) -> None:
        """Make sure that there is TensorBoard.

        Args:
            run: the run folder.
            settings: all settings, nested, as files hold them; shown under TEXT.
        """
        super().__init__()
        self._run = run
        self._settings = settings or {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the files.

        What they hold of later steps than the one gone on from is taken back, or curves would have two values
        at a step.
        """
        from torch.utils.tensorboard import SummaryWriter

        if self.tb_writer is not None:  # that of training before a rollback
            self.tb_writer.close()
        purge_step = state.global_step + 1 if state.global_step else None
        self.tb_writer = SummaryWriter(str(self._run / "runs"), purge_step=purge_step)
        if self._settings:
            self.tb_writer.add_text("settings", settings_rows(self._settings))
        super().on_train_begin(args, state, control, **kwargs)
