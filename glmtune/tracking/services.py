"""TensorBoard, W&B, MLflow and SwanLab: whether they can be used, and what names a run there.

What training (through transformers' callbacks) and evaluation (``scores.py``) have in common.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError

TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab")
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


def check_trackers(names: Sequence[str], *, setting: str = "trainer.report_to") -> None:
    """Make sure that every tracker can be imported; called before a model is loaded.

    Args:
        names: of trackers.
        setting: that names them.

    Raises:
        ConfigError: a package is not installed, cannot be imported, or is switched off.
    """
    for name in names:
        named = f"`{setting}` names `{name}`, but"
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


def settings_rows(settings: Mapping[str, Any]) -> str:
    """Return settings as a Markdown table, which TensorBoard shows under TEXT.

    Args:
        settings: nested.
    """
    rows = (f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in flat(settings).items())
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def could_not_start(name: str, error: Exception, setting: str) -> ConfigError:
    """Return what is said where a tracker does not start: its own words, and the ways out.

    Args:
        name: of the tracker.
        error: of its package, or of the server behind it.
        setting: that names it.
    """
    return ConfigError(
        f"`{setting}` names `{name}`, which could not start: {str(error).strip()} {WAYS_OUT.get(name, '')} Or"
        f" leave it out of `{setting}`."
    )


def use_project(name: str) -> str:
    """Return where runs are gathered, and let the package know; what the user has said counts.

    Args:
        name: ``wandb`` or ``mlflow``.
    """
    return os.environ.setdefault(PROJECT_VARIABLES[name], PROJECT)


def begin_swanlab(run_name: str | None) -> None:
    """Begin SwanLab's run, unless there is one; transformers' callback then takes it.

    By itself (5.24) it asks `get_run` whether there is one; since SwanLab 0.8 that raises if there is none.

    Args:
        run_name: of the run.
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
        swanlab.init(project=project, experiment_name=run_name, **given)


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
