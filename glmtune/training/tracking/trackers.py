"""TensorBoard, W&B, MLflow and SwanLab: each gets the run's name, all its settings, and what was trained on.

transformers' callbacks do the sending. By themselves they know `TrainingArguments` and the model's
configuration only: no prefix, no data. Ours go with them when they have started, so that a run can be found
by what decided it. Settings are sent as files hold them: what comes from the environment stays a reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.errors import ConfigError

PROJECT = "glmtune"
# Where runs are gathered unless the user has said where; W&B's would be `huggingface`. For SwanLab see
# `_begin_swanlab`.
PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
WAYS_OUT = {
    "wandb": "Log in with `wandb login`, or write to this machine only: WANDB_MODE=offline.",
    "swanlab": "Log in with `swanlab login`, or write to this machine only: SWANLAB_MODE=local (or offline).",
    "mlflow": "Check MLFLOW_TRACKING_URI; `file:mlruns` writes to a folder of this machine.",
}
LONGEST_PARAMETER = 500
"""Characters of a value in MLflow's parameters; servers of before 2.10 refuse longer ones."""


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that every tracker can be imported; called before a model is loaded.

    Args:
        names: as in ``trainer.report_to``.

    Raises:
        ConfigError: a package is not installed, cannot be imported, or is switched off.
    """
    for name in names:
        named = f"`trainer.report_to` names `{name}`, but"
        spec = importlib.util.find_spec(name)
        # Without an origin it is a mere folder of this name, such as the one that W&B writes its runs to.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"{named} the package {name} is not installed. Install it with `pip install {name}`, or "
                "leave it out."
            )
        if name == "tensorboard":
            continue  # a dependency; importing it takes seconds that nobody has to wait for here
        if name == "mlflow" and os.environ.get("DISABLE_MLFLOW_INTEGRATION", "").upper() == "TRUE":
            raise ConfigError(f"{named} DISABLE_MLFLOW_INTEGRATION is set, which switches it off. Unset it.")
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a package of others does when it is imported
            raise ConfigError(
                f"{named} the package {name} cannot be imported: {type(error).__name__}: {error}. Install it "
                f"anew with `pip install --force-reinstall {name}`, or leave it out."
            ) from error


def run_name(folder: Path) -> str:
    """Return the name of a run at trackers: its folder's."""
    return folder.expanduser().resolve().name


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
                os.environ.setdefault(PROJECT_VARIABLES[name], PROJECT)
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
                _begin_swanlab(args)
            setup(args, state, model, **kwargs)
            if state.is_world_process_zero:
                SENDERS[name](settings)
        except Exception as error:  # of a package of others, or of the server behind it
            raise ConfigError(
                f"`trainer.report_to` names `{name}`, which could not start: {str(error).strip()} "
                f"{WAYS_OUT[name]} Or leave it out of `trainer.report_to`."
            ) from error

    return start


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return nested settings by their path.

    >>> flat({"seed": 1, "data": {"train_file": "a.json", "dir": None}})
    {'seed': 1, 'data.train_file': 'a.json', 'data.dir': None}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}{name}.")
        else:
            found[f"{path}{name}"] = value
    return found


def _begin_swanlab(args: TrainingArguments) -> None:
    """Begin SwanLab's run, which transformers' callback then takes.

    By itself (5.24) it asks `get_run` whether there is one; since SwanLab 0.8 that raises if there is none.
    """
    import swanlab  # pyright: ignore[reportMissingImports]

    try:
        is_running = swanlab.get_run() is not None
    except RuntimeError:
        is_running = False
    if not is_running:
        names = {"id": "SWANLAB_RUN_ID", "resume": "SWANLAB_RESUME"}
        given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
        # SWANLAB_PROJECT is the name that transformers documents; SwanLab itself, since 0.8, stops at it.
        project = os.environ.pop("SWANLAB_PROJECT", None) or os.environ.get("SWANLAB_PROJ_NAME") or PROJECT
        swanlab.init(project=project, experiment_name=args.run_name, **given)


def _to_wandb(settings: Mapping[str, Any]) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    wandb.config.update(dict(settings), allow_val_change=True)


def _to_swanlab(settings: Mapping[str, Any]) -> None:
    import swanlab  # pyright: ignore[reportMissingImports]

    swanlab.config.update(dict(settings))


def _to_mlflow(settings: Mapping[str, Any]) -> None:
    import mlflow  # pyright: ignore[reportMissingImports]

    texts = {name: str(value) for name, value in flat(settings).items()}
    # A run that goes on under its MLFLOW_RUN_ID has them already, and a parameter never changes there.
    active = mlflow.active_run()
    known = active.data.params if active is not None else {}
    new = [(name, text[:LONGEST_PARAMETER]) for name, text in texts.items() if name not in known]
    for start in range(0, len(new), 100):  # the most that a server takes at once
        mlflow.log_params(dict(new[start : start + 100]))


SENDERS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "wandb": _to_wandb,
    "swanlab": _to_swanlab,
    "mlflow": _to_mlflow,
}


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
            rows = (
                f"| {name} | {json.dumps(value, ensure_ascii=False)} |"
                for name, value in flat(self._settings).items()
            )
            self.tb_writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
        super().on_train_begin(args, state, control, **kwargs)
