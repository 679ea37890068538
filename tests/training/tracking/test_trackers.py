"""Trackers: missing ones are found before anything starts, and those there get name, settings, prefix, data."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from glmtune.errors import ConfigError
from glmtune.tracking import services
from glmtune.tracking.services import check_trackers, run_name
from glmtune.training.tracking.trackers import tracker_callbacks

SETTINGS: dict[str, Any] = {
    "tune": "prefix",
    "prefix": {"pre_seq_len": 32},
    "data": {"train_file": "a.json", "source_prefix": "${oc.env:TOKEN}"},
    "lora": None,
}
FACTS = {"train_rows": 40}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab"])
def test_a_missing_tracker_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=rf"`trainer.report_to` names `{name}`.*pip install {name}"):
        check_trackers([name])
    # W&B and others write their runs to a folder of their own name, which Python takes for a package.
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=rf"the package {name} is not installed"):
        check_trackers([name])


def test_a_broken_tracker_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "swanlab").mkdir()
    (tmp_path / "swanlab" / "__init__.py").write_text("raise ImportError('no pydantic 2')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "swanlab", raising=False)
    with pytest.raises(ConfigError, match=r"`swanlab`.*cannot be imported: ImportError: no pydantic 2"):
        check_trackers(["swanlab"])


def test_a_tracker_switched_off_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", "true")
    with pytest.raises(ConfigError, match="DISABLE_MLFLOW_INTEGRATION"):
        check_trackers(["mlflow"])


def test_nothing_is_loaded_before_trackers_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from glmtune import loading
    from recipes.train import COMMAND, run
    from recipes.words.compose import load_settings

    monkeypatch.setattr(loading, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(services.importlib.util, "find_spec", lambda name: None)
    words = ["+recipe=ptuning", "trainer.report_to=[wandb]", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="pip install wandb"):
        run(load_settings(COMMAND, words))
    assert not (tmp_path / "run").exists()


def test_runs_are_named_by_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_name(Path("runs/my-ads")) == "my-ads"
    monkeypatch.chdir(tmp_path)
    assert run_name(Path()) == tmp_path.name


class FakeSwanLab(ModuleType):
    """SwanLab 0.10.3 as far as transformers and we call it: `get_run` raises where there is no run."""

    def __init__(self) -> None:
        super().__init__("swanlab")
        self.config: dict[str, Any] = {}
        self.begun: dict[str, Any] | None = None

    def get_run(self) -> object:
        if self.begun is None:
            raise RuntimeError("No active Run. Call swanlab.init() first.")
        return self

    def init(self, **options: Any) -> None:
        self.begun = options


class FakeMlflow(ModuleType):
    """MLflow as far as transformers and we call it."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.params: dict[str, Any] = {}
        self.run: Any = None
        self.__version__ = "3.17.2"
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def is_tracking_uri_set(self) -> bool:
        return True

    def get_tracking_uri(self) -> str:
        return "file:mlruns"

    def active_run(self) -> Any:
        return self.run

    def set_experiment(self, name: str) -> None:
        self.experiment = name

    def start_run(self, run_name: str, nested: bool) -> None:
        self.run = SimpleNamespace(info=SimpleNamespace(run_id="1"), data=SimpleNamespace(params={}))
        self.name = run_name

    def log_params(self, values: dict[str, Any], synchronous: bool = True) -> None:
        assert len(values) <= 100
        self.params |= values

    def end_run(self) -> None:
        self.run = None


class FakeWandb(ModuleType):
    """W&B as far as transformers and we call it."""

    def __init__(self, problem: str = "") -> None:
        super().__init__("wandb")
        self.run: Any = None
        self.values: dict[str, Any] = {}
        self.problem = problem
        self.config = self

    def init(self, *, project: str, name: str) -> None:
        if self.problem:
            raise ValueError(self.problem)
        self.run, self.project, self.name = SimpleNamespace(_label=lambda code: None), project, name

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change
        self.values |= values

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value


def begin(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_first: bool = True
) -> None:
    """Start a tracker as training does."""
    from transformers.integrations import integration_utils

    name = module.__name__
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "SWANLAB_PROJ_NAME"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setitem(sys.modules, name, module)
    if name == "wandb":
        for part in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
        sys.modules["wandb.sdk.lib.config_util"].ConfigError = ValueError  # type: ignore[attr-defined]
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    args = TrainingArguments(str(tmp_path), report_to=[], run_name="my-ads", use_cpu=True)
    state: Any = SimpleNamespace(
        is_world_process_zero=is_first, is_hyper_param_search=False, trial_name=None, logging_steps=1
    )
    (callback,) = tracker_callbacks(["tensorboard", name], SETTINGS, FACTS)
    model = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {}), num_parameters=lambda: 5)
    callback.on_train_begin(args, state, SimpleNamespace(), model=model)  # type: ignore[arg-type]


def test_swanlab_of_today(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeSwanLab()
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    begin(fake, monkeypatch, tmp_path)
    assert fake.begun == {"project": "mine", "experiment_name": "my-ads"}
    assert fake.config["prefix"] == {"pre_seq_len": 32}
    assert fake.config["data"] == {"train_file": "a.json", "source_prefix": "${oc.env:TOKEN}"}
    assert fake.config["run"] == FACTS


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeMlflow()
    begin(fake, monkeypatch, tmp_path)
    assert (fake.name, fake.experiment) == ("my-ads", "glmtune")
    wanted = {"prefix.pre_seq_len": "32", "data.train_file": "a.json", "run.train_rows": "40"}
    assert wanted.items() <= fake.params.items()
    assert fake.params["data.source_prefix"] == "${oc.env:TOKEN}"


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    begin(fake, monkeypatch, tmp_path)
    assert (fake.name, fake.project) == ("my-ads", "glmtune")
    assert {name: fake.values[name] for name in SETTINGS} == SETTINGS
    assert fake.values["run"] == FACTS


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeSwanLab()
    begin(fake, monkeypatch, tmp_path, is_first=False)
    assert fake.begun is None


def test_a_tracker_that_cannot_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`wandb`, which could not start: no API key.*WANDB_MODE=offline"):
        begin(FakeWandb("no API key."), monkeypatch, tmp_path)
