"""Curves over the checkpoints of a training run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from evaluation.compare.reporting.curve import curve_table, is_curve
from evaluation.compare.steps import Step, find_steps, make_curve, report_steps
from evaluation.reporting.results import Evaluated, make_result
from evaluation.running.fingerprint import fingerprint
from evaluation.running.runner import run_task
from glmtune.errors import ConfigError
from glmtune.terminal.console import Console
from glmtune.tuned_files import ADAPTER_CONFIG, PREFIX_FILE
from tests.evaluation.doubles import IDENTITY, TableBackend, make_task


def evaluated(folder: Path, num_right: int, *, size: int = 30, left_out: int | None = None) -> Evaluated:
    """An evaluation whose first questions are right."""
    task = make_task(sizes={"law": size})
    answers = run_task(task, TableBackend(), folder).answers
    samples = task.samples
    made = [
        dataclasses.replace(answer, completion=sample.answer if place < num_right else "no idea")
        for place, (sample, answer) in enumerate(zip(samples, answers, strict=True))
    ]
    if left_out is not None:
        task = dataclasses.replace(task, samples=samples[:left_out] + samples[left_out + 1 :])
        del made[left_out]
    values = fingerprint(task, IDENTITY, 2048)
    return Evaluated(make_result(task, made, values), folder, values)


def test_every_step_is_compared_with_the_base(tmp_path: Path) -> None:
    done = {step: evaluated(tmp_path / str(step), right) for step, right in ((0, 10), (20, 14), (40, 24))}
    curve = make_curve(done)
    assert [point.step for point in curve.points] == [0, 20, 40]
    assert [point.score.accuracy for point in curve.points] == pytest.approx([1 / 3, 14 / 30, 0.8])
    assert curve.points[0].change is None
    changes = [point.change for point in curve.points[1:]]
    assert [change.difference_pp for change in changes if change] == pytest.approx([400 / 30, 1400 / 30])
    assert [change.p_value for change in changes if change] == pytest.approx([2 * 0.5**4, 2 * 0.5**14])
    assert [change.p_holm for change in changes if change] == pytest.approx([2 * 0.5**4, 4 * 0.5**14])
    text = curve_table("quiz", curve).to_markdown()
    assert "| base | 30 | 33.33 ± 8.75 |" in text
    assert "| 40 | 30 | 80.00" in text
    assert "Holm's correction over 2 tests" in text
    assert "its accuracy here is then too high" in text


def test_questions_that_a_step_lacks_are_left_out_of_all(tmp_path: Path) -> None:
    curve = make_curve({0: evaluated(tmp_path / "0", 10), 5: evaluated(tmp_path / "5", 12, left_out=0)})
    assert [point.score.num_samples for point in curve.points] == [29, 29]
    assert curve.points[0].score.accuracy == pytest.approx(9 / 29)


def test_files_of_a_curve(tmp_path: Path) -> None:
    done = {step: [evaluated(tmp_path / str(step), 10 + step)] for step in (0, 2)}
    folder = report_steps(Path("runs/x"), done, Console(quiet=True), output_dir=tmp_path / "out", paper=True)
    for name in ("curve.md", "curve.json", "curve.png", "curve.svg", "curve.pdf", "tables.tex"):
        assert (folder / name).stat().st_size > 300, name
    values = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in values["benchmarks"]["quiz"]["points"]] == [0, 2]
    assert is_curve(folder)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "novel.txt").write_text("once", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no curve of glmtune \(novel\.txt\)"):
        report_steps(Path("runs/x"), done, Console(quiet=True), output_dir=tmp_path / "taken")


def test_checkpoints_are_found_by_their_files(tmp_path: Path) -> None:
    for number, name in ((100, PREFIX_FILE), (20, PREFIX_FILE), (3, ADAPTER_CONFIG)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / name).write_text("x", encoding="utf-8")
    (tmp_path / "last").mkdir()
    (tmp_path / ".checkpoint-7.partial").mkdir()
    assert find_steps(tmp_path) == [
        Step(0),
        Step(3, {"adapter_path": str(tmp_path / "checkpoint-3")}),
        Step(20, {"prefix_path": str(tmp_path / "checkpoint-20")}),
        Step(100, {"prefix_path": str(tmp_path / "checkpoint-100")}),
    ]


def test_runs_without_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`checkpoints` is `.*absent`.*does not exist.*save_total_limit"):
        find_steps(tmp_path / "absent")
    with pytest.raises(ConfigError, match="there is no folder checkpoint-N in it"):
        find_steps(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ConfigError, match="checkpoint-3 holds neither a prefix, an adapter nor a model"):
        find_steps(tmp_path)


def test_a_curve_is_named_as_its_evaluations_are(tmp_path: Path) -> None:
    """Whose words, whose sample, a part: what stands in the titles of the steps stands in the curve's."""
    done = {step: evaluated(tmp_path / str(step), 10) for step in (0, 5)}
    said = {"template": "mine.jinja", "template_hash": "0"}

    def told(each: Evaluated, **changes) -> Evaluated:
        task = dataclasses.replace(each.result.task, **changes)
        return dataclasses.replace(each, result=dataclasses.replace(each.result, task=task))

    whole = {step: told(each, is_sample_set=True, own_prompt=said) for step, each in done.items()}
    assert make_curve(whole).title == "SAMPLE Quiz val, test, template mine.jinja"
    assert make_curve(done).title == "Quiz val, test"
    assert make_curve({0: done[0], 5: told(done[5], is_partial=True)}).title == "PARTIAL Quiz val, test"
