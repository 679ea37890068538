"""A user's own subjects in the layout of C-Eval or MMLU: asked by name, apart from the official averages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evaluation.answer import Answer
from evaluation.benchmarks.tasks import make_task
from evaluation.compare.pairing.runs import read_run
from evaluation.metrics import OWN_SUBJECTS
from evaluation.reporting.files import write_report
from evaluation.reporting.results import Result, make_result, results_json
from evaluation.running.fingerprint import fingerprint
from evaluation.task import Task
from glmtune.data.reading.shipped import shipped_folder
from glmtune.errors import ConfigError, DataError
from tests.evaluation.doubles import IDENTITY

SPLIT = {"ceval": "val", "mmlu": "test"}
HEAD = {"ceval": "id,question,A,B,C,D,answer\n", "mmlu": ""}


def add_subject(folder: Path, benchmark: str, name: str, rows: int = 3, split: str = "") -> None:
    split = split or SPLIT[benchmark]
    lines = [f"问 {split}{index}?,1,2,3,4,B\n" for index in range(rows)]
    if benchmark == "ceval":
        lines = [f"{index},{line}" for index, line in enumerate(lines)]
    (folder / split).mkdir(parents=True, exist_ok=True)
    text = HEAD[benchmark] + "".join(lines)
    (folder / split / f"{name}_{split}.csv").write_text(text, encoding="utf-8")


@pytest.fixture(params=["ceval", "mmlu"])
def benchmark(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(benchmark: str, tmp_path: Path) -> Path:
    found = tmp_path / benchmark
    shutil.copytree(shipped_folder() / f"{benchmark}_sample", found)
    add_subject(found, benchmark, "客服")
    return found


def answered(task: Task) -> Result:
    """All right in own subjects, all wrong elsewhere."""
    answers = [
        Answer(*sample.key, completion=f"The answer is {'B' if sample.subject == '客服' else 'nothing'}.")
        for sample in task.samples
    ]
    return make_result(task, answers, fingerprint(task, IDENTITY, 512))


def test_nobody_is_asked_them_unnamed(benchmark: str, folder: Path) -> None:
    task = make_task(benchmark, data_dir=folder)
    assert "客服" not in {sample.subject for sample in task.samples}
    assert task.own_subjects == ()
    assert not task.is_partial


def test_alone(benchmark: str, folder: Path) -> None:
    task = make_task(benchmark, data_dir=folder, subjects=["客服"])
    assert [sample.answer for sample in task.samples] == ["B"] * 3
    assert (task.own_subjects, task.is_own) == (("客服",), True)
    values = results_json(answered(task))
    assert values["title"].startswith("OWN SAMPLE ")
    assert (values["accuracy_micro"], values["num_samples"]) == (1.0, 3)
    assert OWN_SUBJECTS not in values["further"]
    assert not answered(task).is_comparable


def test_beside_official_ones_they_stand_apart(benchmark: str, folder: Path, tmp_path: Path) -> None:
    everything = make_task(benchmark, data_dir=folder)
    official = list(dict.fromkeys(sample.subject for sample in everything.samples))
    task = make_task(benchmark, data_dir=folder, subjects=["客服", *official])
    assert not task.is_partial
    result = answered(task)
    values = results_json(result)
    assert (values["accuracy_micro"], values["accuracy_macro"]) == (0.0, 0.0)
    assert values["num_samples"] == len(everything.samples)
    assert values["further"][OWN_SUBJECTS]["accuracy"] == values["subjects"]["客服"]["accuracy"] == 1.0
    assert values["own_subjects"] == ["客服"]
    assert "OWN" not in values["title"]
    # A comparison reads the run, all of its answers included.
    write_report(result, tmp_path / "run")
    assert len(read_run(tmp_path / "run").rows) == len(task.samples)


def test_a_folder_with_nothing_else(benchmark: str, tmp_path: Path) -> None:
    add_subject(tmp_path / "mine", benchmark, "hr")
    add_subject(tmp_path / "mine", benchmark, "hr", 2, split="dev")
    task = make_task(benchmark, data_dir=tmp_path / "mine", subjects=["hr"])
    assert len(task.samples) == 3
    shots = make_task(benchmark, data_dir=tmp_path / "mine", subjects=["hr"], protocol="few_shot_direct")
    assert shots.num_fewshot == 2
    assert "hr" in shots.prompt(shots.samples[0]).turns[0].content
    with pytest.raises(DataError, match="neither there nor in a folder"):
        make_task(benchmark, data_dir=tmp_path / "mine")


def test_they_take_no_exemplars_from_the_official_ones(benchmark: str, folder: Path) -> None:
    add_subject(folder, benchmark, "客服", 2, split="dev")
    official = make_task(benchmark, data_dir=folder).samples[0].subject
    with pytest.raises(ConfigError, match="`客服`, which has 2 exemplars, beside official subjects with 5"):
        make_task(benchmark, data_dir=folder, subjects=[official, "客服"], protocol="few_shot_direct")


def test_wrong_files_and_names(benchmark: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"`benchmark.subjects` is `客户`.*客服"):
        make_task(benchmark, data_dir=folder, subjects=["客户"])
    add_subject(folder, benchmark, "empty", 0)
    with pytest.raises(DataError, match="no questions"):
        make_task(benchmark, data_dir=folder, subjects=["empty"])
