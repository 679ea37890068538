"""The run folder: when a run goes on, when it is refused, when it is finished, what becomes of what was there."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glmtune.errors import CheckpointError, ConfigError, TrainingError
from glmtune.storage.manifest import MANIFEST
from glmtune.training.checkpoints.folder import publish, read_manifest, writing
from glmtune.training.log import append_entry, read_log
from glmtune.training.report import summarize_run
from glmtune.training.run_folder import changed_settings, check_fingerprints, open_run, plan_start
from glmtune.training.starting.changes import read_changes

SETTINGS: dict[str, Any] = {
    "model": {"source": "glm-tiny", "device": "auto"},
    "prefix": {"pre_seq_len": 8},
    "trainer": {"learning_rate": 0.02, "save_steps": 10, "report_to": ["tensorboard"]},
    "seed": 1,
}
STATE = ("optimizer.pt", "scheduler.pt", "loss_state.json")


def changed(**trainer: Any) -> dict[str, Any]:
    return {**SETTINGS, "trainer": {**SETTINGS["trainer"], **trainer}}


def saved(folder: Path, step: int, *, best: int | None = None) -> Path:
    """Write a checkpoint as training does, with `last` and, at its step, `best`."""
    facts = {"data_fingerprint": "d1", "step": step}
    checkpoint = folder / f"checkpoint-{step}"
    with writing(checkpoint, manifest=facts) as partial:
        for name in ("weights", *STATE):
            (partial / name).write_text(f"{name} of {step}")
        state = {"best_global_step": best, "best_metric": 2.5}
        (partial / "trainer_state.json").write_text(json.dumps(state))
    publish(checkpoint, folder / "last", manifest=facts)
    if best == step:
        publish(checkpoint, folder / "best", manifest=facts)
    append_entry(folder, {"step": step, "alert": "saved"})
    return checkpoint


def started(folder: Path, *steps: int) -> Path:
    open_run(plan_start(str(folder), resume="auto", settings=SETTINGS))
    for step in steps:
        saved(folder, step, best=steps[0])
    return folder


def started_again(run: Path, resume: str = "auto", settings: dict[str, Any] | None = None) -> Any:
    """Plan, see that planning alone changes nothing, then open."""
    before = content(run)
    start = plan_start(str(run), resume=resume, settings=settings or SETTINGS)
    assert content(run) == before
    open_run(start)
    return start


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
        if not path.name.endswith(".lock")  # what a killed process left is cleared away
    }


def damage(path: Path) -> None:
    """Flip one bit; the file is no longer that of its hard links."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_new_run(tmp_path: Path) -> None:
    start = plan_start(str(tmp_path / "a" / "b"), resume="auto", settings=SETTINGS)
    assert (start.checkpoint, start.finished) == (None, None)
    assert not (tmp_path / "a").exists()  # planning makes nothing
    assert open_run(start) is None
    assert "learning_rate: 0.02" in (start.folder / "config.yaml").read_text()


def test_goes_on_from_the_newest(tmp_path: Path) -> None:
    run = started(tmp_path, 10, 20)
    (run / ".checkpoint-30.partial").mkdir()
    (run / ".merged.partial").mkdir()  # of an export that is at work
    start = started_again(run)
    assert start.checkpoint == run / "checkpoint-20"
    assert not (run / ".checkpoint-30.partial").exists()
    assert (run / ".merged.partial").exists()
    assert not (run / "previous").exists()


def test_goes_back_to_the_one_named_and_loses_nothing(tmp_path: Path) -> None:
    run = started(tmp_path, 10, 20, 30)
    (run / "all_results.json").write_text(json.dumps({"finished": True, "steps": 30}))
    before = content(run)
    start = started_again(run, str(run / "checkpoint-10"))
    assert start.checkpoint == run / "checkpoint-10"
    assert not (run / "checkpoint-20").exists()  # its steps are about to be repeated
    kept = content(run / "previous" / "1")
    for name in ("checkpoint-20", "checkpoint-30", "last"):
        assert [kept[file] for file in before if file.startswith(name)] == [
            before[file] for file in before if file.startswith(name)
        ]
    for name in ("all_results.json", "config.yaml", "trainer_log.jsonl"):
        assert kept[name] == before[name]
    assert (read_manifest(run / "last") or {})["step"] == 10
    assert (read_manifest(run / "best") or {})["step"] == 10
    with pytest.raises(CheckpointError, match=r"checkpoint-99.*no complete checkpoint: there is no such"):
        plan_start(str(run), resume=str(run / "checkpoint-99"), settings=SETTINGS)


def test_goes_on_with_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    origin, run = started(tmp_path / "one", 10, 20, 30), started(tmp_path / "two", 5)
    before, mine = content(origin), content(run)
    start = started_again(run, str(origin / "checkpoint-20"))
    assert content(origin) == before
    assert start.checkpoint == origin / "checkpoint-20"
    assert content(run / "previous" / "1") == mine
    # What it needs is its own now: the same command with resume=auto goes on here.
    assert plan_start(str(run), resume="auto", settings=SETTINGS).checkpoint == run / "checkpoint-20"
    assert [(entry["step"], entry["alert"]) for entry in read_log(run)] == [(20, "branched")]
    steps = [{"step": step, "loss": step, "tokens": 1, "tokens_per_second": 1.0} for step in (25, 30)]
    entries = [*read_log(run), *({**entry, "memory_bytes": 1} for entry in steps)]
    assert summarize_run(entries)["train_loss"] == 27.5  # steps 21 to 25 weigh no more than 26 to 30
    assert (read_manifest(run / "last") or {})["step"] == 20
    assert (read_manifest(run / "best") or {})["step"] == 10
    with pytest.raises(ConfigError, match=r"one holds a run with other settings.*\n.*learning_rate"):
        plan_start(str(run), resume=str(origin / "checkpoint-20"), settings=changed(learning_rate=1.0))


def test_goes_back_to_what_was_set_aside(tmp_path: Path) -> None:
    run = started(tmp_path, 10, 20)
    started_again(run, "never")
    saved(run, 7)
    start = started_again(run, str(run / "previous" / "1" / "checkpoint-20"))
    assert start.checkpoint == run / "previous" / "1" / "checkpoint-20"
    assert (run / "previous" / "2" / "checkpoint-7").is_dir()
    assert (run / "checkpoint-20" / "optimizer.pt").read_text() == "optimizer.pt of 20"


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    with pytest.raises(ConfigError) as caught:
        plan_start(str(run), resume="auto", settings=changed(learning_rate=0.01))
    for word in (
        "`trainer.learning_rate`: 0.02 then, 0.01 now",
        "resume=never",
        "resume=force",
        "output_dir",
    ):
        assert word in str(caught.value)
    assert "0.02" in (run / "config.yaml").read_text()
    start = started_again(run, "force", changed(learning_rate=0.01))
    assert start.checkpoint == run / "checkpoint-10"
    assert "0.01" in (run / "config.yaml").read_text()
    assert "0.02" in (run / "previous" / "forced-1" / "config.yaml").read_text()


def test_free_settings_may_change(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    start = started_again(run, settings=changed(save_steps=5, report_to=[]))
    assert start.checkpoint == run / "checkpoint-10"
    assert changed_settings(SETTINGS, {**SETTINGS, "prefix": None}) == [
        "`prefix.pre_seq_len`: 8 then, None now"
    ]


def test_never_keeps_the_earlier_run(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    before = content(run)
    start = started_again(run, "never", changed(learning_rate=0.01))
    assert start.checkpoint is None
    assert content(run / "previous" / "1") == before
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "previous", "trainer_log.jsonl"]


def test_a_log_of_other_settings_is_kept(tmp_path: Path) -> None:
    """A run killed before its first checkpoint leaves a log alone."""
    run = started(tmp_path)
    append_entry(run, {"step": 3, "alert": "x"})
    assert started_again(run).aside == ()
    append_entry(run, {"step": 3, "alert": "x"})
    started_again(run, settings=changed(learning_rate=0.01))
    assert [entry["step"] for entry in read_log(run / "previous" / "1")] == [3]
    assert read_log(run) == []


@pytest.mark.parametrize("stops_after", range(1, 7))
def test_killed_while_an_earlier_run_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_after: int
) -> None:
    """Whatever is left goes on with the newest checkpoint and a whole log, or is refused; nothing is lost."""
    run = started(tmp_path, 10, 20)
    (run / "all_results.json").write_text(json.dumps({"finished": True, "steps": 20}))
    before = content(run)
    start = plan_start(str(run), resume="never", settings=SETTINGS)
    rename, moves = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        if "previous" in str(target):
            moves.append(self.name)
            if len(moves) > stops_after:
                raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(start)
    assert {**content(run), **content(run / "previous" / "1")}.items() >= before.items()
    try:
        again = plan_start(str(run), resume="auto", settings=SETTINGS)
    except ConfigError as error:
        assert "no checkpoint to go on from" in str(error)  # noqa: PT017
        assert not list(run.glob("checkpoint-*"))
    else:
        if again.checkpoint is not None:
            assert again.checkpoint.name == "checkpoint-20"
            assert [entry["step"] for entry in read_log(run)] == [10, 20]
        else:
            assert set(moves[:-1]) >= {"checkpoint-10", "checkpoint-20", "last", "best"}


def test_finished_run_is_said_so(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    (run / "all_results.json").write_text(json.dumps({"finished": True, "steps": 10}))
    assert plan_start(str(run), resume="auto", settings=SETTINGS).finished == {"finished": True, "steps": 10}
    with pytest.raises(ConfigError, match=r"seed.*1 then, 2 now"):
        plan_start(str(run), resume="auto", settings={**SETTINGS, "seed": 2})
    assert started_again(run, "force").checkpoint == run / "checkpoint-10"
    assert not (run / "all_results.json").exists()
    assert (run / "previous" / "forced-1" / "all_results.json").exists()


def test_other_model_or_data_is_refused(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    check_fingerprints(run / "checkpoint-10", {"data_fingerprint": "d1"})
    with pytest.raises(ConfigError, match=r"another data fingerprint: d1 then, d2 now.*resume=never"):
        check_fingerprints(run / "checkpoint-10", {"data_fingerprint": "d2"})


# ---- tuned weights are never replaced by those of step 1


@pytest.mark.parametrize("resume", ["auto", "force"])
@pytest.mark.parametrize("left", ["last", "best", ".last.replaced", "all_results.json"])
def test_tuned_weights_without_checkpoints_are_refused(tmp_path: Path, left: str, resume: str) -> None:
    run = started(tmp_path, 10)
    if left == "all_results.json":
        (run / left).write_text("{}")
    if left == ".last.replaced":
        (run / "last").rename(run / left)
    for name in {"last", "best", "checkpoint-10"} - {left}:
        shutil.rmtree(run / name, ignore_errors=True)
    before = content(run)
    with pytest.raises(ConfigError) as caught:
        plan_start(str(run), resume=resume, settings=SETTINGS)
    for word in (
        left,
        "no checkpoint to go on from",
        "`output_dir`",
        "resume=never",
        "prefix_path=",
        "init_from=",
    ):
        assert word in str(caught.value)
    assert content(run) == before
    started_again(run, "never")
    kept = content(run / "previous" / "1")
    assert kept.keys() >= before.keys() - {name for name in before if name.startswith(".")}


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "scheduler.pt", "loss_state.json"])
def test_newest_that_lost_a_file_is_said_and_kept(tmp_path: Path, name: str) -> None:
    run = started(tmp_path, 10, 20)
    (run / "checkpoint-20" / name).unlink()
    before = content(run)
    start = started_again(run)
    assert start.checkpoint == run / "checkpoint-10"
    assert start.damaged == {"checkpoint-20": f"{name} is missing"}
    kept = content(run / "previous" / "1")
    assert all(kept[file] == before[file] for file in before if file.startswith(("checkpoint-20/", "last/")))
    assert any(name in str(entry.get("text")) for entry in read_log(run))
    assert (read_manifest(run / "last") or {})["step"] == 10


def test_a_manifest_of_before_that_never_had_an_optimizer(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    shutil.rmtree(run / "checkpoint-10")
    shutil.copytree(run / "last", run / "checkpoint-10")
    with pytest.raises(ConfigError, match=r"checkpoint-10: it holds no state of the optimizer"):
        plan_start(str(run), resume="auto", settings=SETTINGS)


# ---- damage


@pytest.mark.parametrize("name", ["weights", "optimizer.pt", "trainer_state.json", MANIFEST])
def test_a_damaged_newest_falls_back(tmp_path: Path, name: str) -> None:
    run = started(tmp_path, 10, 20)
    damage(run / "checkpoint-20" / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint-20.*{name} is damaged"):
        plan_start(str(run), resume=str(run / "checkpoint-20"), settings=SETTINGS)
    start = started_again(run)
    assert start.checkpoint == run / "checkpoint-10"
    assert name in start.damaged["checkpoint-20"]
    assert (run / "previous" / "1" / "checkpoint-20").is_dir()


def test_none_is_whole(tmp_path: Path) -> None:
    run = started(tmp_path, 10, 20)
    damage(run / "checkpoint-10" / "weights")
    (run / "checkpoint-20" / "optimizer.pt").write_text("cut")
    with pytest.raises(ConfigError) as caught:
        plan_start(str(run), resume="auto", settings=SETTINGS)
    assert "checkpoint-10: weights is damaged" in str(caught.value)
    assert "checkpoint-20: optimizer.pt has 3 bytes" in str(caught.value)


def test_checkpoints_of_before_have_sizes_alone(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    manifest = json.loads((run / "checkpoint-10" / MANIFEST).read_text())
    old = {name: manifest[name] for name in ("files", "data_fingerprint", "step")}
    (run / "checkpoint-10" / MANIFEST).write_text(json.dumps(old, indent=2))
    assert started_again(run).checkpoint == run / "checkpoint-10"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "text"),
        ("all_results.json", '{"finished": tru'),
        ("rollbacks.json", "[1]"),
    ],
)
def test_what_cannot_be_read_refuses(tmp_path: Path, name: str, text: str) -> None:
    run = started(tmp_path, 10)
    (run / name).write_text(text)
    with pytest.raises((ConfigError, CheckpointError), match=rf"(?s){name} cannot be read.*resume=never"):
        plan_start(str(run), resume="auto", settings=SETTINGS)
    started_again(run, "never")
    assert (run / "previous" / "1" / name).read_text() == text


@pytest.mark.parametrize("place", [f"checkpoint-20/{MANIFEST}", "checkpoint-20", "config.yaml"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_no_permission_is_not_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int
) -> None:
    """By patching: root may read everything."""
    import os

    run = started(tmp_path, 10, 20)
    before = content(run)
    refused, read, listed, opened = run / place, Path.read_text, os.listdir, Path.open

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == refused:
            raise OSError(code, os.strerror(code), str(self))
        return read(self, *args, **kwargs)

    def open_path(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == refused:
            raise OSError(code, os.strerror(code), str(self))
        return opened(self, *args, **kwargs)

    def listdir(path: Any = ".") -> list[str]:
        if Path(path) == refused:
            raise OSError(code, os.strerror(code), str(path))
        return listed(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", read_text)
        patched.setattr(Path, "open", open_path)
        patched.setattr(os, "listdir", listdir)
        with pytest.raises((ConfigError, CheckpointError), match=rf"{place}.*cannot be read"):
            plan_start(str(run), resume="auto", settings=SETTINGS)
    assert content(run) == before


# ---- what is not ours


def test_predictions_at_work_are_not_moved(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    lock = (
        "import sys, time; from pathlib import Path; from glmtune.storage.lock import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", lock, str(run / "predict")], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"held"
        before = content(run)
        with pytest.raises(ConfigError, match=r"predict is being written by another process"):
            plan_start(str(run), resume="never", settings=SETTINGS)
        assert content(run) == before
        other.kill()
    started_again(run, "never")
    assert (run / "previous" / "1" / "predict").is_dir()


@pytest.mark.parametrize("resume", ["auto", "force", "never", "checkpoint-10"])
def test_checkpoints_of_other_tools_are_never_touched(tmp_path: Path, resume: str) -> None:
    run = started(tmp_path, 10, 20)
    foreign = {}
    for step in (5, 15, 3000):
        (run / f"checkpoint-{step}").mkdir()
        for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
            (run / f"checkpoint-{step}" / name).write_text("theirs")
    foreign = {name: data for name, data in content(run).items() if data == b"theirs"}
    assert len(foreign) == 12
    started_again(run, str(run / resume) if "-" in resume else resume)
    saved(run, 30)
    assert {name: data for name, data in content(run).items() if data == b"theirs"} == foreign


def test_output_dir_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"`output_dir` is .*run`, which is a file"):
        plan_start(str(tmp_path / "run"), resume="auto", settings=SETTINGS)


def test_output_dir_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot be written: .*Name a folder"):
        plan_start(str(tmp_path / "file" / "run"), resume="auto", settings=SETTINGS)


def test_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(README.md\).*new or empty"):
        plan_start(str(tmp_path), resume="auto", settings=SETTINGS)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_batch_sizes_from_the_environment_are_compared_as_their_references() -> None:
    rows, steps = "per_device_train_batch_size", "gradient_accumulation_steps"

    def given(*values: object) -> dict[str, object]:
        return {"trainer": dict(zip((rows, steps), values, strict=True)), "launch": {"num_processes": 2}}

    stored = given("${oc.env:ROWS}", "${oc.env:STEPS}")
    assert changed_settings(stored, given("${oc.env:STEPS}", "${oc.env:ROWS}")) == []
    assert changed_settings(stored, given("${oc.env:ROWS}", 4)) == [
        "`rows per optimizer step`: 2 × ${oc.env:ROWS} × ${oc.env:STEPS} then, 8 × ${oc.env:ROWS} now"
    ]


def test_a_change_is_recorded_though_a_kill_comes_right_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml is written last: what a kill leaves before it is still seen as a change, and kept once."""
    run = started(tmp_path, 10)
    forced = changed(learning_rate=0.5)

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("glmtune.training.run_folder.write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(plan_start(str(run), resume="force", settings=forced))
    open_run(plan_start(str(run), resume="force", settings=forced))
    changes = read_changes(run)
    assert [entry["after_step"] for entry in changes] == [10]
    assert "learning_rate" in changes[0]["changes"][0]


def test_what_a_run_begins_with_is_not_moved_away_by_it(tmp_path: Path) -> None:
    run = started(tmp_path, 10)
    before = content(run)
    for path in (run / "checkpoint-10", run / "checkpoint-10" / "prefix_encoder.safetensors"):
        with pytest.raises(
            ConfigError, match=r"`prefix_path` is .*checkpoint-10.*would move into `previous/`"
        ):
            plan_start(str(run), resume="never", settings={**SETTINGS, "prefix_path": str(path)})
    assert content(run) == before
