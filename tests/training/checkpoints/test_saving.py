"""Checkpoints written beside training: the same files, one at a time, and failures that are not lost."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from glmtune.errors import TrainingError
from glmtune.storage import files
from glmtune.training import session
from glmtune.training.checkpoints import folder as checkpoints
from glmtune.training.checkpoints import saving
from glmtune.training.checkpoints.saving import in_host_memory
from tests.training.conftest import MakeTrainer

CLOCK = ("trainer_state.json", checkpoints.MANIFEST)
"""Files with times in them, or with the sizes of such files."""


def contents(folder: Path) -> dict[str, Any]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in CLOCK]
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path: Path) -> Any:
    """The bytes of a file; of safetensors, whose header comes in any order, what they say."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}


@pytest.mark.parametrize("full", [False, True])
def test_the_files_are_those_of_a_run_that_waits(make_trainer: MakeTrainer, full: bool) -> None:
    runs = []
    for folder, beside in (("waits", False), ("beside", True)):
        trainer = make_trainer(folder=folder, full=full, save_steps=2, async_save=beside)
        session.train(trainer, None, tensorboard=False)
        assert trainer.saves.asynchronous is beside
        runs.append(trainer.run_folder)
    names = ("checkpoint-2", "checkpoint-4", "last", "best")
    for name in names:
        assert checkpoints.read_manifest(runs[1] / name) is not None
        expected, found = (contents(run / name) for run in runs)
        assert expected.keys() == found.keys()
        assert [file for file in expected if expected[file] != found[file]] == []
    manifests = [[checkpoints.read_manifest(run / name) or {} for name in names] for run in runs]
    facts = [[{**values, "files": sorted(values["files"])} for values in run] for run in manifests]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_file_is_on_disk_before_the_checkpoint_has_its_name(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    steps: list[tuple[str, Path]] = []
    sync, rename = files.sync, Path.rename

    def synced(path: Path) -> None:
        steps.append(("sync", path))
        sync(path)

    def renamed(path: Path, target: Path) -> Path:
        steps.append(("rename", path))
        return rename(path, target)

    monkeypatch.setattr(files, "sync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    trainer = make_trainer(save_steps=2, max_steps=2, async_save=asynchronous)
    session.train(trainer, None, tensorboard=False)
    run = trainer.run_folder
    for name in ("checkpoint-2", "last", "best"):
        partial, final = run / f".{name}.partial", run / name
        before = steps[: steps.index(("rename", partial))]
        assert {path for what, path in before if what == "sync"} >= {
            partial,
            *(partial / path.relative_to(final) for path in final.rglob("*")),
        }
        assert ("sync", run) in steps[len(before) :], "the name is data of the run folder"
    assert (run / "checkpoint-2" / saving.OPTIMIZER_FILE).is_file()


def test_training_goes_on_while_a_checkpoint_is_written(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(save_steps=2, max_steps=6, async_save=True)
    go_on, seen = threading.Semaphore(0), []
    complete, step_end = saving.complete, trainer.watch.on_step_end

    def slow(job: Any, group: Any) -> None:
        assert go_on.acquire(timeout=60)
        complete(job, group)

    def look(*args: Any, **kwargs: Any) -> None:
        step_end(*args, **kwargs)
        found = [path.name for path in checkpoints.checkpoints(trainer.run_folder)]
        seen.append((trainer.state.global_step, found))
        if trainer.state.global_step in (3, 5, 6):  # the next checkpoint waits for the one before
            go_on.release()

    monkeypatch.setattr(saving, "complete", slow)
    monkeypatch.setattr(trainer.watch, "on_step_end", look)
    session.train(trainer, None, tensorboard=False)
    assert seen[2] == (3, [])  # step 3 came before checkpoint 2 was complete
    assert seen[4] == (5, ["checkpoint-2"])
    assert [path.name for path in checkpoints.checkpoints(trainer.run_folder)] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_a_full_disk_stops_the_run_within_a_step(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(save_steps=2, max_steps=20, async_save=True)
    torch_save, written = torch.save, threading.Event()

    def save(value: Any, path: Path | str) -> None:
        if Path(path).parts[-2:] == (".checkpoint-4.partial", saving.OPTIMIZER_FILE):
            written.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        torch_save(value, path)

    monkeypatch.setattr(saving.torch, "save", save)
    with pytest.raises(
        TrainingError, match=r"checkpoint-4` could not be written: .*No space.*checkpoint-2 is"
    ):
        session.train(trainer, None, tensorboard=False)
    assert written.is_set()
    assert trainer.state.global_step < 20
    run = trainer.run_folder
    assert [path.name for path in checkpoints.checkpoints(run)] == ["checkpoint-2"]
    assert not list(run.glob(".checkpoint*"))
    assert (checkpoints.read_manifest(run / "last") or {})["step"] == 2


def test_a_failure_elsewhere_waits_for_the_checkpoint(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(save_steps=2, max_steps=6, async_save=True)
    complete, failed = saving.complete, threading.Event()

    def late(job: Any, group: Any) -> None:
        assert failed.wait(60)
        complete(job, group)

    def fail(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 3:
            failed.set()
            raise TrainingError("the third step failed")

    monkeypatch.setattr(saving, "complete", late)
    monkeypatch.setattr(trainer.watch, "on_step_end", fail)
    with pytest.raises(TrainingError, match="third step"):
        session.train(trainer, None, tensorboard=False)
    assert [path.name for path in checkpoints.checkpoints(trainer.run_folder)] == ["checkpoint-2"]


def test_copies_are_apart_from_what_they_copy() -> None:
    weight = torch.ones(3, requires_grad=True)
    values = {"state": {0: {"exp_avg": weight, "step": 3}}, "groups": [(weight, "adam")]}
    copies = in_host_memory(values)
    with torch.no_grad():
        weight.zero_()
    assert copies["state"][0]["exp_avg"].tolist() == copies["groups"][0][0].tolist() == [1, 1, 1]
    assert (copies["state"][0]["step"], copies["groups"][0][1]) == (3, "adam")
