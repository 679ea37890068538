"""The run folder: when a run goes on, when it is refused, when it is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmtune.errors import CheckpointError, ConfigError, TrainingError
from glmtune.training.checkpoints.folder import writing
from glmtune.training.run_folder import changed_settings, check_fingerprints, start_run

SETTINGS: dict[str, Any] = {
    "model": {"source": "glm-tiny", "device": "auto"},
    "prefix": {"pre_seq_len": 8},
    "trainer": {"learning_rate": 0.02, "save_steps": 10, "report_to": ["tensorboard"]},
    "seed": 1,
}


def changed(**trainer: Any) -> dict[str, Any]:
    return {**SETTINGS, "trainer": {**SETTINGS["trainer"], **trainer}}


def started(folder: Path, *steps: int) -> Path:
    start_run(str(folder), resume="auto", settings=SETTINGS)
    for step in steps:
        with writing(folder / f"checkpoint-{step}", manifest={"data_fingerprint": "d1"}) as checkpoint:
            (checkpoint / "weights").write_text("w")
    return folder


def test_new_run(tmp_path: Path) -> None:
    start = start_run(str(tmp_path / "a" / "b"), resume="auto", settings=SETTINGS)
    assert start.checkpoint is None
    assert start.finished is None
    assert "learning_rate: 0.02" in (start.folder / "config.yaml").read_text()


def test_goes_on_from_the_newest(tmp_path: Path) -> None:
    run = started(tmp_path, 10, 20)
    (run / ".checkpoint-30.partial").mkdir()
    start = start_run(str(run), resume="auto", settings=SETTINGS)
    assert start.checkpoint == run / "checkpoint-20"
    assert not (run / ".checkpoint-30.partial").exists()


def test_goes_on_from_the_one_named(tmp_path: Path) -> None:
    run = started(tmp_path, 10, 20)
    start = start_run(str(run), resume=str(run / "checkpoint-10"), settings=SETTINGS)
    assert start.checkpoint == run / "checkpoint-10"
    assert not (run / "checkpoint-20").exists()  # its steps are about to be repeated
    with pytest.raises(CheckpointError, match=r"checkpoint-99.*no complete checkpoint"):
        start_run(str(run), resume=str(run / "checkpoint-99"), settings=SETTINGS)


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    with pytest.raises(ConfigError) as caught:
        start_run(str(run), resume="auto", settings=changed(learning_rate=0.01))
    for word in (
        "`trainer.learning_rate`: 0.02 then, 0.01 now",
        "resume=never",
        "resume=force",
        "output_dir",
    ):
        assert word in str(caught.value)
    assert "0.02" in (run / "config.yaml").read_text()
    start = start_run(str(run), resume="force", settings=changed(learning_rate=0.01))
    assert start.checkpoint == run / "checkpoint-10"
    assert "0.01" in (run / "config.yaml").read_text()


def test_free_settings_may_change(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    start = start_run(str(run), resume="auto", settings=changed(save_steps=5, report_to=[]))
    assert start.checkpoint == run / "checkpoint-10"
    assert changed_settings(SETTINGS, {**SETTINGS, "prefix": None}) == [
        "`prefix.pre_seq_len`: 8 then, None now"
    ]


def test_never_keeps_the_earlier_run(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    start = start_run(str(run), resume="never", settings=changed(learning_rate=0.01))
    assert start.checkpoint is None
    assert start.set_aside == run / "previous" / "1"
    assert (run / "previous" / "1" / "checkpoint-10" / "weights").exists()


def test_finished_run_is_said_so(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    (run / "all_results.json").write_text(json.dumps({"finished": True, "steps": 10}))
    assert start_run(str(run), resume="auto", settings=SETTINGS).finished == {"finished": True, "steps": 10}
    with pytest.raises(ConfigError, match=r"seed.*1 then, 2 now"):
        start_run(str(run), resume="auto", settings={**SETTINGS, "seed": 2})
    assert start_run(str(run), resume="force", settings=SETTINGS).checkpoint == run / "checkpoint-10"
    assert not (run / "all_results.json").exists()


def test_other_model_or_data_is_refused(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    check_fingerprints(run / "checkpoint-10", {"data_fingerprint": "d1"})
    with pytest.raises(ConfigError, match=r"another data fingerprint: d1 then, d2 now.*resume=never"):
        check_fingerprints(run / "checkpoint-10", {"data_fingerprint": "d2"})


def test_output_dir_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"`output_dir` is .*run`, which is a file"):
        start_run(str(tmp_path / "run"), resume="auto", settings=SETTINGS)


def test_output_dir_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot be written: .*Name a folder"):
        start_run(str(tmp_path / "file" / "run"), resume="auto", settings=SETTINGS)


def test_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(README.md\).*new or empty"):
        start_run(str(tmp_path), resume="auto", settings=SETTINGS)
    assert (tmp_path / "README.md").read_text() == "mine"
