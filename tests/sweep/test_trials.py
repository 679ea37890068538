"""Records survive kills and damage; a sweep goes on with its own trials only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from glmtune.errors import ConfigError
from glmtune.sweep.space import Point
from glmtune.sweep.trials import (
    Trial,
    TrialRecord,
    known_records,
    open_sweep,
    parse_record,
    refuse_other_runs,
)

POINT = Point((("trainer.learning_rate", "0.001"),))
GRID = {"settings": ["a"], "search": "grid"}
DONE = TrialRecord("a", ("x=1",), "done", {"eval_loss": 1.5}, 2.0)
SETTINGS: dict[str, Any] = {
    "tune": "prefix", "seed": 42, "output_dir": "a", "trainer": {"learning_rate": 0.001, "logging_steps": 10,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, "launch": {"num_processes": None},
}  # fmt: skip


def test_a_record_is_read_back() -> None:
    assert parse_record(DONE.to_line()) == DONE
    failed = TrialRecord("b", (), "failed", {}, 1.0, -9, "killed by SIGKILL")
    assert parse_record(failed.to_line()) == failed


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "no", '{"name": "a", "words": [], "state": "odd"}', '{"name": "a", "words": 3, "state": "done"}'],
    ids=["empty", "list", "text", "state", "words"],
)  # fmt: skip
def test_lines_that_are_no_records(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_record(line)


def test_the_last_record_of_a_trial_counts_and_a_torn_line_none(tmp_path: Path) -> None:
    with open_sweep(tmp_path / "s", GRID) as journal:
        journal.append(TrialRecord("a", ("x=1",), "failed", reason="no"))
        journal.append(DONE)
    with (tmp_path / "s" / "sweep.jsonl").open("a") as file:
        file.write('{"name": "b", "wor')
    with open_sweep(tmp_path / "s", GRID) as journal:
        assert known_records(journal) == {"a": DONE}
        with pytest.raises(ConfigError, match="another process"):
            open_sweep(tmp_path / "s", GRID)


def test_a_sweep_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    for _ in range(2):
        with open_sweep(tmp_path / "s", GRID):
            pass
    with pytest.raises(ConfigError, match=r"another sweep \(settings: \['a'\] then, \['a', 'b'\] now\)"):
        open_sweep(tmp_path / "s", {**GRID, "settings": ["a", "b"]})
    with open_sweep(tmp_path / "s", GRID):  # what is refused holds no lock
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no sweep of glmtune"):
        open_sweep(tmp_path / "other", GRID)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({}, None, id="same"),
        pytest.param({"trainer": {**SETTINGS["trainer"], "logging_steps": 3}}, None, id="free"),
        pytest.param({"seed": 7}, r"`seed`: 7 then, 42 now", id="seed"),
        pytest.param({"launch": {"num_processes": 1}}, None, id="processes"),
    ],
)
def test_trials_of_other_settings_are_refused(
    changed: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **changed}))
    trial = Trial(POINT, 42, folder, tmp_path / "a.log", ("x=1",), SETTINGS)
    if message is None:
        refuse_other_runs([trial], {"a": DONE})
        return
    for records in ({"a": DONE}, {}):
        with pytest.raises(ConfigError, match=message):
            refuse_other_runs([trial], records)
    refuse_other_runs([trial], {"a": TrialRecord("a", (), "failed", reason="no")})


def test_a_trial_whose_folder_is_gone_is_known_by_its_words(tmp_path: Path) -> None:
    trial = Trial(POINT, 42, tmp_path / "a", tmp_path / "a.log", ("x=1",), SETTINGS)
    refuse_other_runs([trial], {"a": DONE})
    with pytest.raises(ConfigError, match=r"x=1; x=2"):
        refuse_other_runs([Trial(POINT, 42, tmp_path / "a", tmp_path, ("x=2",), SETTINGS)], {"a": DONE})


def test_a_damaged_identity_does_not_lock_out(tmp_path: Path) -> None:
    (tmp_path / "sweep_config.json").write_text("{")
    with open_sweep(tmp_path, GRID):
        pass
    assert json.loads((tmp_path / "sweep_config.json").read_text())["search"] == "grid"
