"""Checkpoints: complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from glmtune.errors import CheckpointError, ConfigError, TrainingError
from glmtune.storage import lock
from glmtune.storage.checksums import file_checksum
from glmtune.storage.manifest import check_files
from glmtune.training.checkpoints import folder as checkpoints


def write(run: Path, step: int, **files: str) -> Path:
    final = run / f"checkpoint-{step}"
    with checkpoints.writing(final, manifest={"step": step}) as folder:
        for name, text in (files or {"weights": "w", "optimizer.pt": "o"}).items():
            (folder / name).write_text(text)
    return final


def test_complete_after_writing(tmp_path: Path) -> None:
    final = write(tmp_path, 5)
    assert checkpoints.read_manifest(final) == {"files": {"optimizer.pt": 1, "weights": 1}, "step": 5}
    written = json.loads((final / checkpoints.MANIFEST).read_text())
    assert written["checksums"] == {name: file_checksum(final / name) for name in ("optimizer.pt", "weights")}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("stream write")]
)
def test_failed_write_leaves_the_older_one(tmp_path: Path, error: Exception) -> None:
    final = write(tmp_path, 5, weights="old")

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("new, half of")
        raise error

    with pytest.raises(TrainingError) as caught, checkpoints.writing(final) as folder:
        fail(folder)
    assert (final / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    for word in (str(error), "checkpoint-5 is intact", "save_total_limit", "same command again"):
        assert word in str(caught.value)


def test_failed_first_write_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint had been written yet"):
        with checkpoints.writing(tmp_path / "checkpoint-1"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    for step in (2, 10, 30, 40):
        write(tmp_path, step)
    (tmp_path / "checkpoint-30" / "weights").write_text("")  # cut off
    (tmp_path / "checkpoint-40" / checkpoints.MANIFEST).unlink()
    (tmp_path / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert checkpoints.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    with pytest.raises(CheckpointError, match=r"checkpoint-30.*no complete checkpoint.*resume=auto"):
        checkpoints.checkpoint_at(tmp_path / "checkpoint-30")


def test_a_folder_that_predict_fills_is_not_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    (tmp_path / "predict").mkdir()
    (tmp_path / "predict" / "rows").touch()
    with lock.lock_folder(tmp_path / "predict"):
        with pytest.raises(ConfigError, match=r"predict is being written by another process"):
            checkpoints.set_aside(tmp_path)
    assert checkpoints.set_aside(tmp_path) == tmp_path / "previous" / "1"
    assert [path.name for path in (tmp_path / "previous" / "1" / "predict").iterdir()] == ["rows"]


def test_repair_leaves_what_other_commands_prepare(tmp_path: Path) -> None:
    """An export into the run folder may be at work while the same run is started again."""
    theirs = [tmp_path / name for name in (".export.partial", ".int4.replaced", ".notes.md.partial")]
    for folder in theirs:
        folder.mkdir()
    (tmp_path / ".last.partial").mkdir()
    checkpoints.repair(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(theirs)


def test_repair(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-7.partial").mkdir()
    (tmp_path / ".checkpoint-7.partial" / "weights").write_text("half")
    (tmp_path / ".config.yaml.partial").write_text("half")
    write(tmp_path, 5).rename(tmp_path / ".last.replaced")  # killed between the two renames
    checkpoints.repair(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    (tmp_path / ".last.replaced").mkdir()  # killed after them
    checkpoints.repair(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_repair_leaves_what_others_are_writing(tmp_path: Path) -> None:
    """`export` and `predict` may be at work in the run folder, and so may other tools."""
    theirs = [".merged.partial", ".predict_results.json.partial", ".checkpoint-x.partial", ".notes.replaced"]
    for name in theirs:
        (tmp_path / name).write_text("half")
    (tmp_path / "predict").mkdir()
    (tmp_path / "predict" / ".last.partial").write_text("half")
    checkpoints.repair(tmp_path)
    assert all((tmp_path / name).exists() for name in (*theirs, "predict/.last.partial"))


def test_rotate(tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        write(tmp_path, step)
    for step in (1, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("of another tool")
    checkpoints.remove_oldest(tmp_path, keep=None)
    assert len(checkpoints.checkpoints(tmp_path)) == 4
    checkpoints.remove_oldest(tmp_path, keep=3)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == [9, 10, 11]
    assert (tmp_path / "checkpoint-1").exists()
    assert (tmp_path / "checkpoint-12").exists()


def test_a_checkpoint_of_another_tool_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "weights").write_text("theirs")
    checkpoints.refuse_foreign_between(tmp_path, 6, 9)
    with pytest.raises(TrainingError, match=r"checkpoint-6.*not written by glmtune"):
        checkpoints.refuse_foreign_between(tmp_path, 5, 9)
    with pytest.raises(TrainingError, match=r"checkpoint-6.*not written by glmtune"):
        write(tmp_path, 6)
    assert (tmp_path / "checkpoint-6" / "weights").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_publish_holds_the_model_alone(tmp_path: Path) -> None:
    source = write(
        tmp_path, 3, **{"weights": "w", "optimizer.pt": "o", "rng_state_1.pth": "r", "loss_state.json": "l"}
    )
    checkpoints.publish(source, tmp_path / "last", manifest={"step": 3})
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["checkpoint.json", "weights"]
    assert json.loads((tmp_path / "last" / "checkpoint.json").read_text())["step"] == 3
    check_files(tmp_path / "last")
    checkpoints.remove_oldest(tmp_path, keep=1)
    write(tmp_path, 4)
    checkpoints.remove_oldest(tmp_path, keep=1)
    assert not source.exists()
    assert (tmp_path / "last" / "weights").read_text() == "w"


def test_set_aside_takes_the_run_and_nothing_else(tmp_path: Path) -> None:
    assert checkpoints.set_aside(tmp_path) is None
    for round_number in (1, 2):
        write(tmp_path, 3)
        (tmp_path / "config.yaml").write_text("a: 1")
        (tmp_path / "notes.txt").write_text("mine")
        assert checkpoints.set_aside(tmp_path) == tmp_path / "previous" / str(round_number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous"]
    assert (tmp_path / "previous" / "2" / "checkpoint-3" / "weights").exists()
