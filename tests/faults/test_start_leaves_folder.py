"""A start that fails leaves the run folder byte for byte as it was, and the run there goes on as before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glmtune import loading
from glmtune.errors import GlmtuneError
from glmtune.training.starting.changes import FREE
from glmtune.training.trainer import GlmTrainer
from tests.conftest import slow_except
from tests.faults.run_folders import command, content, train, train_killed


@pytest.fixture(scope="module")
def killed_run(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run killed in step 6, and one that ended."""
    place = tmp_path_factory.mktemp("start")
    killed, ended = place / "killed", place / "ended"
    train_killed(command(tiny_base, tiny_rows, killed), in_step=6)
    train(command(tiny_base, tiny_rows, ended))
    return killed, ended


@pytest.fixture
def words(tiny_base: Path, tiny_rows: dict[str, Path]) -> Callable[[Path], list[str]]:
    return lambda folder: command(tiny_base, tiny_rows, folder)


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


RESUMES = ["auto", "force", "never", "RUN/checkpoint-2", "OTHER/checkpoint-4"]
WRONG = [
    "data.train_file=typo.jsonl",
    "data.validation_file=typo.jsonl",
    "model.source=nowhere/model",
    "trainer.report_to=[swanlab]",
    "trainer.learning_rate=0.5 data.train_file=typo.jsonl",
    "data.train_file=EMPTY",
]
CELLS = [(wrong, resume, which) for wrong in WRONG for resume in RESUMES for which in ("killed", "ended")]
QUICK = [
    ("data.train_file=typo.jsonl", "never", "killed"),
    ("data.train_file=typo.jsonl", "RUN/checkpoint-2", "ended"),
    ("trainer.learning_rate=0.5 data.train_file=typo.jsonl", "force", "killed"),
    ("trainer.report_to=[swanlab]", "never", "ended"),
    ("model.source=nowhere/model", "OTHER/checkpoint-4", "killed"),
    ("data.train_file=EMPTY", "auto", "killed"),
]


@pytest.mark.parametrize(("wrong", "resume", "which"), slow_except(QUICK, CELLS))
def test_wrong_settings(
    killed_run: tuple[Path, Path], words: Any, tmp_path: Path, which: str, resume: str, wrong: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    folder = copied(killed_run[which == "ended"], tmp_path / "run")
    other = copied(killed_run[0], tmp_path / "other")
    resume = resume.replace("RUN", str(folder)).replace("OTHER", str(other))
    more = wrong.replace("EMPTY", str(tmp_path / "empty.jsonl")).split()
    before = content(tmp_path)
    is_free = wrong.split("=")[0] in FREE
    if which == "ended" and resume == "auto" and is_free:
        train([*words(folder), *more])  # finished: nothing is loaded
    else:
        with pytest.raises(GlmtuneError):
            train([*words(folder), *more, f"resume={resume}"])
    assert content(tmp_path) == before


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


FAILURES = {
    "Ctrl-C while the model is read": (loading, "load_base", interrupted),
    "memory ends in the evaluation before tuning": (GlmTrainer, "evaluate", out_of_memory),
    "the optimizer's state does not fit": (GlmTrainer, "_load_optimizer_and_scheduler", out_of_memory),
    "Ctrl-C while everything is restored": (GlmTrainer, "_begin", interrupted),
}


@pytest.mark.parametrize(
    ("failure", "resume"),
    [
        (failure, resume)
        for failure in FAILURES
        for resume in ("auto", "never", "RUN/checkpoint-2")
        # Only a run that begins is evaluated before, only one that goes on has a state to restore.
        if not ("evaluation" in failure and resume != "never")
        and not ("state" in failure and resume == "never")
    ],
)
def test_failures_before_the_first_step(
    killed_run: tuple[Path, Path],
    words: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
    resume: str,
) -> None:
    folder = copied(killed_run[0], tmp_path / "run")
    before = content(folder)
    with monkeypatch.context() as patched:
        patched.setattr(*FAILURES[failure])
        with pytest.raises((KeyboardInterrupt, GlmtuneError)):
            train([*words(folder), f"resume={resume.replace('RUN', str(folder))}"])
    assert content(folder) == before


@pytest.mark.parametrize("tune", ["prefix.pre_seq_len=5", "prefix.prefix_projection=true"])
def test_another_shape_under_force(
    killed_run: tuple[Path, Path], words: Any, tmp_path: Path, tune: str
) -> None:
    folder = copied(killed_run[0], tmp_path / "run")
    before = content(folder)
    with pytest.raises((GlmtuneError, RuntimeError)):
        train([*words(folder), tune, "resume=force"])
    assert content(folder) == before


def test_other_data_is_refused_by_its_fingerprint(
    killed_run: tuple[Path, Path], words: Any, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(killed_run[0], tmp_path / "run")
    before = content(folder)
    for resume in ("auto", f"{folder}/checkpoint-2"):
        with pytest.raises(GlmtuneError, match="another data fingerprint"):
            train([*words(folder), f"data.train_file={tiny_rows['validation']}", f"resume={resume}"])
    assert content(folder) == before


def test_a_new_folder_is_not_even_begun(words: Any, tmp_path: Path) -> None:
    with pytest.raises(GlmtuneError):
        train([*words(tmp_path / "a" / "run"), "data.train_file=typo.jsonl"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_the_run_goes_on_after_all_that_as_if_nothing_had_been(
    killed_run: tuple[Path, Path], words: Any, tmp_path: Path
) -> None:
    folder = copied(killed_run[0], tmp_path / "run")
    for resume in ("never", "force", f"{folder}/checkpoint-2"):
        with pytest.raises(GlmtuneError):
            train([*words(folder), f"resume={resume}", "data.train_file=typo.jsonl"])
    assert train(words(folder)).steps == 6
    for name in ("last", "best"):
        weights = [load_file(run / name / "prefix_encoder.safetensors") for run in (folder, killed_run[1])]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1]), name


def test_going_back_and_starting_anew_keep_what_was_there(
    killed_run: tuple[Path, Path], words: Any, tmp_path: Path
) -> None:
    folder = copied(killed_run[1], tmp_path / "run")
    whole = content(folder)
    assert train([*words(folder), f"resume={folder}/checkpoint-2"]).steps == 6
    kept = content(folder / "previous" / "1")
    for name in ("checkpoint-4", "checkpoint-6", "last", "all_results.json", "trainer_log.jsonl"):
        assert [kept[file] for file in whole if file.startswith(name)] == [
            whole[file] for file in whole if file.startswith(name)
        ]
    ended = content(folder)
    assert train([*words(folder), "resume=never"]).steps == 6
    moved = content(folder / "previous" / "2")
    assert moved == {name: data for name, data in ended.items() if not name.startswith("previous")}
