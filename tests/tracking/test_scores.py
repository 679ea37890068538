"""Figures of evaluations at trackers: name, settings, every score by step; errors in words."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from glmtune.errors import ConfigError
from glmtune.tracking.scores import TrackedScores, mlflow_name, send_scores

RUN = {"benchmark": {"name": "quiz"}, "samples": 4}
SCORES = [(0, {"quiz/accuracy": 0.25, "quiz/pass@2": 0.5}), (20, {"quiz/accuracy": 0.75})]


@pytest.fixture(autouse=True)
def _no_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "SWANLAB_PROJ_NAME", "SWANLAB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


class Recorder(ModuleType):
    """What the three packages have in common, as far as they are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: dict[str, Any] | None = None
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.is_finished = False
        self.config = self

    def init(self, **options: Any) -> Recorder:
        self.begun = options
        return self

    def update(self, values: dict[str, Any], **options: Any) -> None:
        self.settings |= values

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


class Wandb(Recorder):
    pass


class SwanLab(Recorder):
    def get_run(self) -> object:
        raise RuntimeError("No active Run.")


class Mlflow(Recorder):
    def set_experiment(self, name: str) -> None:
        self.begun = {"experiment": name}

    @contextmanager
    def start_run(self, run_name: str):
        assert self.begun is not None
        self.begun["name"] = run_name
        yield self
        self.is_finished = True

    def active_run(self) -> None:
        return None

    def log_params(self, values: dict[str, str]) -> None:
        self.settings |= values

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def sent(module: Recorder, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Recorder:
    monkeypatch.setitem(sys.modules, module.__name__, module)
    send_scores([module.__name__], TrackedScores("my-run", folder, RUN, SCORES))
    assert module.is_finished
    return module


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = sent(Wandb("wandb"), monkeypatch, tmp_path)
    assert fake.begun == {"project": "glmtune", "name": "my-run"}
    assert (fake.settings, fake.logged) == (RUN, SCORES)


def test_swanlab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = sent(SwanLab("swanlab"), monkeypatch, tmp_path)
    assert fake.begun == {"project": "glmtune", "experiment_name": "my-run"}
    assert (fake.settings, fake.logged) == (RUN, SCORES)


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = sent(Mlflow("mlflow"), monkeypatch, tmp_path)
    assert fake.begun == {"experiment": "glmtune", "name": "my-run"}
    assert fake.settings == {"benchmark.name": "quiz", "samples": "4"}
    assert fake.logged[0] == (0, {"quiz/accuracy": 0.25, "quiz/pass_at_2": 0.5})


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send_scores(["tensorboard"], TrackedScores("my-run", tmp_path, RUN, SCORES))
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("quiz/accuracy")] == [(0, 0.25), (20, 0.75)]


def test_names_that_mlflow_would_refuse() -> None:
    assert mlflow_name("客服/pass@8: a+b") == "客服/pass_at_8_ a_b"


def test_a_tracker_that_cannot_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Refusing(Wandb):
        def init(self, **options: Any) -> Recorder:
            raise ValueError("no API key.")

    monkeypatch.setitem(sys.modules, "wandb", Refusing("wandb"))
    with pytest.raises(
        ConfigError, match=r"`report_to` names `wandb`.*no API key.*WANDB_MODE=offline.*`report_to`\."
    ):
        send_scores(["wandb"], TrackedScores("my-run", tmp_path, RUN, SCORES))
