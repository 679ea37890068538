"""Benchmarks from the Hugging Face hub, written in their official layouts (the hub is a stand-in here)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks import hub
from evaluation.benchmarks.benchmark import subject_table
from evaluation.benchmarks.hub import fetch_from_hub
from evaluation.benchmarks.tasks import make_task
from glmtune.errors import ConfigError, DataError

SIZES = {"dev": "dev", "val": "val", "validation": "val", "test": "test"}


class FakeHub:
    """Answers like the hub's data sets, with rows of the official number."""

    def __init__(self, *, labelled_test: bool = False, fail_at: int | None = None) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.labelled_test = labelled_test
        self.fail_at = fail_at

    def __call__(self, repository: str, config: str, split: str) -> list[Mapping[str, Any]]:
        self.asked.append((repository, config, split))
        if self.fail_at is not None and len(self.asked) > self.fail_at:
            raise ConnectionError("no route to host")
        name = "ceval" if "ceval" in repository else "mmlu"
        count = 5 if split == "dev" else subject_table(name)[config][SIZES[split]]
        return [self.row(name, config, split, index) for index in range(count)]

    def row(self, name: str, config: str, split: str, index: int) -> Mapping[str, Any]:
        question = f'{config}, "{split}"\n{index}'
        if name == "mmlu":
            return {
                "question": question,
                "subject": config,
                "choices": ["None", "b", "c", "d"],
                "answer": index % 4,
            }
        answer = "" if split == "test" and not self.labelled_test else "ABCD"[index % 4]
        options = {"A": "一", "B": "二", "C": "三", "D": "四"}
        return {"id": index, "question": question, **options, "answer": answer, "explanation": "因为。"}


def test_ceval_and_mmlu_arrive_in_their_official_layouts(tmp_path: Path) -> None:
    for name, split, size in (("ceval", "val", 1346), ("mmlu", "test", 14042)):
        folder = fetch_from_hub(name, tmp_path / name, FakeHub())
        task = make_task(name, protocol="few_shot_direct", split=split, data_dir=folder)
        assert len(task.samples) == size
        assert not task.is_sample_set
        assert task.samples[6].answer == "C"
        assert task.samples[6].question.endswith('"\n6')
    assert task.samples[6].choices == ("None", "b", "c", "d")


def test_test_answers_are_written_where_the_hub_has_them(tmp_path: Path) -> None:
    without = make_task("ceval", split="test", data_dir=fetch_from_hub("ceval", tmp_path / "a", FakeHub()))
    with_answers = fetch_from_hub("ceval", tmp_path / "b", FakeHub(labelled_test=True))
    assert not without.labelled
    assert make_task("ceval", split="test", data_dir=with_answers).labelled


def test_a_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    broken = FakeHub(fail_at=10)
    with pytest.raises(DataError, match=r"ceval/ceval-exam .*cannot be read from the hub: no route to host"):
        fetch_from_hub("ceval", tmp_path, broken)
    assert len(list(tmp_path.rglob("*.csv"))) == 10
    rest = FakeHub()
    fetch_from_hub("ceval", tmp_path, rest)
    assert len(rest.asked) == 3 * 52 - 10
    assert fetch_from_hub("ceval", tmp_path, FakeHub(fail_at=0)) == tmp_path


def test_data_dir_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMTUNE_DATA", str(tmp_path))
    monkeypatch.setattr(hub, "load_rows", FakeHub())
    task = make_task("mmlu", data_dir="hub", subjects=["anatomy"])
    assert len(task.samples) == 135
    assert task.source == str(tmp_path / "mmlu")
    assert len(make_task("mmlu", subjects=["anatomy"]).samples) == 135


def test_benchmarks_that_are_not_there_in_full(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"bbh is not on the hub with its exemplars\. Use `glmtune data fetch bbh`"
    ):
        make_task("bbh", data_dir="hub")
    with pytest.raises(DataError, match=r"has no column 'question'"):
        fetch_from_hub("mmlu", tmp_path, lambda repository, config, split: [{"input": "?"}])
    assert not list(tmp_path.rglob("*.csv"))


def test_rows_of_the_hub_as_json_lines(tmp_path: Path) -> None:
    asked: list[tuple[str, str, str]] = []

    def load(repository: str, config: str, split: str) -> list[Mapping[str, Any]]:
        asked.append((repository, config, split))
        return [
            {
                "question_id": place,
                "question": f"{split} {place}?",
                "options": ["是", "no"],
                "answer": "B",
                "cot_content": "A: Let's think step by step. The answer is (B).",
                "category": "history",
            }
            for place in range(5 if split == "validation" else 381)
        ]

    folder = fetch_from_hub("mmlu_pro", tmp_path, load)
    assert asked == [("TIGER-Lab/MMLU-Pro", "default", split) for split in ("validation", "test")]
    task = make_task("mmlu_pro", data_dir=folder, subjects=["history"])
    assert (len(task.samples), task.samples[9].choices, task.num_fewshot) == (381, ("是", "no"), 5)
    again = fetch_from_hub("mmlu_pro", tmp_path, FakeHub(fail_at=0))
    assert again == folder
