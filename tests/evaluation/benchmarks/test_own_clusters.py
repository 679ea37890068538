"""Questions that hang together: the `cluster` column of a described benchmark, from file to table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from evaluation.benchmarks.tasks import make_task
from glmtune.cli import main
from glmtune.errors import DataError

ABOUT = {
    "title": "Mine", "files": {"test": "rows.jsonl"}, "question": "{{ q }}", "answer": "a", "prompt": "{{ question }}",
}  # fmt: skip


def write(folder: Path, documents: list[object], **more: object) -> Path:
    rows = [{"q": f"What of {place}?", "a": "yes", "doc": name} for place, name in enumerate(documents)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**ABOUT, **more}), encoding="utf-8")
    return file


def test_a_column_names_clusters_and_changes_no_question(tmp_path: Path) -> None:
    file = write(tmp_path, ["a", "a", 7], cluster="doc")
    task = make_task(str(file))
    assert [sample.cluster for sample in task.samples] == ["a", "a", "7"]
    plain = make_task(str(write(tmp_path, ["a", "a", 7])))
    assert [sample.cluster for sample in plain.samples] == ["", "", ""]
    assert (task.data_hash, task.prompt_hash) == (plain.data_hash, plain.prompt_hash)


def test_a_question_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl.*line 2.*`doc` is empty"):
        make_task(str(write(tmp_path, ["a", " ", "b"], cluster="doc")))
    with pytest.raises(DataError, match=r"no `page`, which mine.yaml names as `cluster`"):
        make_task(str(write(tmp_path, ["a"], cluster="page")))


def test_errors_are_clustered_in_reports_and_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    write(tmp_path, [f"d{place // 4}" for place in range(24)], cluster="doc")
    for name, wrong in (("a", range(0)), ("b", range(8)), ("c", range(6, 14))):
        lines = [
            {"subject": "mine", "index": place, "completion": "no" if place in wrong else "yes"}
            for place in range(24)
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        assert main(["eval", "benchmark=mine.yaml", f"completions={name}.jsonl", f"output_dir={name}"]) == 0
    values = json.loads(Path("b/results.json").read_text(encoding="utf-8"))
    found = values["clustered"]["cluster"]
    assert (found["num_questions"], found["num_clusters"]) == (24, 6)
    assert found["design_effect"] == pytest.approx(1 + 3, rel=0.1), "whole documents are right or wrong"
    assert "Clustered errors" in capsys.readouterr().out
    assert main(["compare", "runs=[a,b,c]", "cluster=cluster", "output_dir=table"]) == 0
    pair = json.loads(Path("table/compare.json").read_text(encoding="utf-8"))["benchmarks"]["mine"]["pairs"][
        "A - B"
    ]
    assert (pair["num_clusters"], pair["difference_pp"]) == (6, pytest.approx(100 / 3))
    assert main(["compare", "runs=[a,b]", "output_dir=two"]) in (3, 4)
    assert "Clustered drops" in capsys.readouterr().out
    clustered = json.loads(Path("two/compare.json").read_text(encoding="utf-8"))["benchmarks"]["mine"][
        "clustered"
    ]
    assert clustered["cluster"]["num_clusters"] == 6
    assert main(["compare", "runs=[a,b]", "cluster=subject", "output_dir=three"]) == 2
