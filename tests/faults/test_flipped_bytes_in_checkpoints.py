"""One byte of a run folder is flipped: whoever loads it says so, or nothing that counts has changed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from glmtune.errors import CheckpointError, ConfigError, GlmtuneError
from glmtune.models.load import load_official
from glmtune.prefix.checkpoint import find_prefix
from glmtune.storage.manifest import MANIFEST
from glmtune.training.checkpoints.folder import read_manifest
from glmtune.training.log import LOG_FILE, read_log
from glmtune.training.run_folder import RunStart, plan_start
from tests.faults.run_folders import command, train, train_killed

SEED = 13


@pytest.fixture(scope="module")
def killed_run(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run killed in step 6, and one that ended."""
    place = tmp_path_factory.mktemp("flips")
    train_killed(command(tiny_base, tiny_rows, place / "killed"), in_step=6)
    train(command(tiny_base, tiny_rows, place / "ended"))
    return place / "killed", place / "ended"


@pytest.fixture
def folder(killed_run: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(killed_run[0], tmp_path / "run")
    return tmp_path / "run"


def settings_of(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def flip(path: Path, number: random.Random) -> bytes:
    """Change one byte at random, in place; return what the file was."""
    before = path.read_bytes()
    place, bit = number.randrange(len(before)), 1 << number.randrange(8)
    path.write_bytes(before[:place] + bytes([before[place] ^ bit]) + before[place + 1 :])
    return before


def plan(run: Path, settings: dict[str, Any]) -> RunStart | GlmtuneError:
    try:
        return plan_start(str(run), resume="auto", settings=settings)
    except GlmtuneError as error:
        return error


def test_every_file_of_the_newest_checkpoint(folder: Path) -> None:
    number, settings = random.Random(SEED), settings_of(folder)
    newest = folder / "checkpoint-4"
    facts = read_manifest(newest)
    for path in sorted(newest.iterdir()):
        for _ in range(12):
            before = flip(path, number)
            start = plan(folder, settings)
            assert isinstance(start, RunStart)
            if path.name == MANIFEST and start.checkpoint == newest:
                assert read_manifest(newest) == facts  # white space, or the word `checksum` itself
            else:
                assert start.checkpoint == folder / "checkpoint-2"
                assert path.name in start.damaged["checkpoint-4"]
                with pytest.raises(CheckpointError, match=f"checkpoint-4.*{path.name} is damaged"):
                    plan_start(str(folder), resume=str(newest), settings=settings)
            path.write_bytes(before)
    assert len(list(newest.iterdir())) >= 7


def test_settings(folder: Path) -> None:
    """What can be read as other settings is refused, or is a setting that decides nothing."""
    number, settings = random.Random(SEED), settings_of(folder)
    refused = 0
    for _ in range(60):
        before = flip(folder / "config.yaml", number)
        found = plan(folder, settings)
        refused += isinstance(found, ConfigError)
        assert isinstance(found, ConfigError) or found.checkpoint == folder / "checkpoint-4"
        (folder / "config.yaml").write_bytes(before)
    assert refused > 20


def test_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    number, whole = random.Random(SEED), without_clock(read_log(folder))
    assert len(whole) == 8
    for _ in range(150):
        before = flip(folder / LOG_FILE, number)
        caplog.clear()
        found = without_clock(read_log(folder))
        if found != whole:
            warned = [record for record in caplog.records if "is left out" in record.message]
            missing = [entry for entry in whole if entry not in found]
            assert [entry for entry in found if entry not in whole] == []
            # A damaged line end makes one line of two.
            assert 0 < len(missing) <= 2
            assert warned
        (folder / LOG_FILE).write_bytes(before)


def test_the_end_of_a_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its last byte flipped: the entry is all there, so no kill did this, and it is not left out in silence."""
    whole, content = without_clock(read_log(folder)), (folder / LOG_FILE).read_bytes()
    (folder / LOG_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 0x40]))
    assert without_clock(read_log(folder)) == whole[:-1]
    assert "line 8 is left out" in caplog.text
    caplog.clear()
    (folder / LOG_FILE).write_bytes(content[:-20])  # as a kill leaves it
    assert without_clock(read_log(folder)) == whole[:-1]
    assert caplog.text == ""
    (folder / LOG_FILE).write_bytes(content)


def without_clock(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries as a repeated run would make them; a damaged word `checksum` is a key of its own."""
    known = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss", "eval_accuracy"}
    return [
        {name: value for name, value in entry.items() if name in {*known, "alert", "text", "eval_tokens"}}
        for entry in entries
    ]


def test_results_and_rollbacks(killed_run: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed_run[1], folder)
    number, settings = random.Random(SEED), settings_of(folder)
    whole = json.loads((folder / "all_results.json").read_text())
    for _ in range(80):
        before = flip(folder / "all_results.json", number)
        found = plan(folder, settings)
        if isinstance(found, RunStart):
            changed = {name for name in whole if (found.finished or {}).get(name) != whole[name]}
            assert changed <= {"checksum", "train_tokens_per_second", "peak_memory_bytes"}
        else:
            assert "all_results.json cannot be read" in str(found)
        (folder / "all_results.json").write_bytes(before)
    (folder / "all_results.json").unlink()
    from glmtune.training.watching.rollback_log import Rollback, read_rollbacks, write_rollbacks

    rollbacks = [Rollback(3, 2, 0.5), Rollback(5, 4, 0.25)]
    write_rollbacks(folder, rollbacks)
    for _ in range(80):
        before = flip(folder / "rollbacks.json", number)
        found = plan(folder, settings)
        if isinstance(found, RunStart):
            assert read_rollbacks(folder) == rollbacks
        else:
            assert "rollbacks.json cannot be read" in str(found)
        (folder / "rollbacks.json").write_bytes(before)


@pytest.mark.parametrize("name", ["last", "best", "checkpoint-4"])
def test_what_is_loaded_from(folder: Path, name: str) -> None:
    number = random.Random(SEED)
    weights = folder / name / "prefix_encoder.safetensors"
    assert find_prefix(folder / name) == weights
    for _ in range(30):
        before = flip(weights, number)
        for place in (folder / name, weights):
            with pytest.raises(CheckpointError, match=rf"{name}.*prefix_encoder.safetensors is damaged"):
                find_prefix(place)
        weights.write_bytes(before)
    whole = read_manifest(folder / name)
    for _ in range(30):
        before = flip(folder / name / MANIFEST, number)
        try:
            find_prefix(folder / name)
        except CheckpointError as error:
            assert "is damaged" in str(error)  # noqa: PT017
        else:
            assert read_manifest(folder / name) == whole
        (folder / name / MANIFEST).write_bytes(before)


def test_a_tuned_model_is_checked_before_it_is_a_base(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    train([*command(tiny_base, tiny_rows, tmp_path / "run", tune="full"), "trainer.max_steps=2"])
    load_official(tmp_path / "run" / "last")
    flip(tmp_path / "run" / "last" / "model.safetensors", random.Random(SEED))
    with pytest.raises(CheckpointError, match=r"last.*model.safetensors is damaged"):
        load_official(tmp_path / "run" / "last")


def test_a_run_that_falls_back_ends_as_one_that_was_never_damaged(
    folder: Path,
    killed_run: tuple[Path, Path],
    tiny_base: Path,
    tiny_rows: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip(folder / "checkpoint-4" / "optimizer.pt", random.Random(SEED))
    damaged = (folder / "checkpoint-4" / "optimizer.pt").read_bytes()
    assert train(command(tiny_base, tiny_rows, folder)).steps == 6
    assert "checkpoint-4 is not whole: optimizer.pt is damaged" in capsys.readouterr().err
    assert (folder / "previous" / "1" / "checkpoint-4" / "optimizer.pt").read_bytes() == damaged
    lines, ended = without_clock(read_log(folder)), without_clock(read_log(killed_run[1]))
    alerts = [line for line in lines if "alert" in line]
    assert [line for line in lines if "alert" not in line] == [line for line in ended if "alert" not in line]
    assert "optimizer.pt is damaged" in alerts[0]["text"]
    for name in ("last", "best"):
        weights = [load_file(run / name / "prefix_encoder.safetensors") for run in (folder, killed_run[1])]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1]), name
