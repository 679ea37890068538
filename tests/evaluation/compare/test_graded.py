"""Grades from 0 to 1: averages, intervals, the paired comparison, and files read back."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from evaluation.answer import Answer
from evaluation.compare.kept import Exam
from evaluation.compare.pairing.match import match
from evaluation.compare.pairing.runs import read_run
from evaluation.compare.reporting.flips import flips_page
from evaluation.compare.reporting.report import compare_pair, markdown
from evaluation.compare.reporting.tables import ComparisonReport
from evaluation.compare.settings import GateSettings
from evaluation.compare.statistics.drops import compare_outcomes
from evaluation.compare.statistics.graded import (
    GradedStrata,
    PairedGrades,
    bootstrap_grades,
    compare_grades,
    has_grades,
    judge_grades,
)
from evaluation.metrics import Groups, Outcome, interval, micro_score, summarize_outcomes
from evaluation.reporting.files import write_report
from evaluation.reporting.results import make_result
from evaluation.running.fingerprint import fingerprint
from evaluation.sample import Sample
from evaluation.settings import BenchmarkSettings
from evaluation.task import Rule, Task
from glmtune.errors import ConfigError, DataError
from tests.evaluation.compare.cases import INT4
from tests.evaluation.doubles import IDENTITY, make_task

GATE = GateSettings(num_resamples=2000)


def outcomes(scores: list[float], subject: str = "law") -> list[Outcome]:
    return [Outcome(subject, index, score == 1, score=score) for index, score in enumerate(scores)]


def pairs(seed: int, size: int, shift: float = 0.05, noise: float = 0.1) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(seed)
    before = generator.uniform(0, 1, size)
    after = np.clip(before - shift + generator.normal(0, noise, size), 0, 1)
    return before.tolist(), after.tolist()


def test_mean_and_error_of_grades() -> None:
    scores = [0.0, 0.25, 0.5, 1.0, 0.75]
    score = micro_score(outcomes(scores))
    assert score.accuracy == pytest.approx(0.5)
    assert score.stderr == pytest.approx(statistics.stdev(scores) / math.sqrt(5))
    low, high = interval(score)
    assert 0 <= low < 0.5 < high <= 1
    assert micro_score(outcomes([0.3])).stderr is None


def test_grades_of_0_and_1_are_accuracies() -> None:
    rights = [True, False, True, True, False, False, True]
    plain = [Outcome("law", index, right) for index, right in enumerate(rights)]
    graded = outcomes([float(right) for right in rights])
    assert micro_score(graded).accuracy == micro_score(plain).accuracy
    assert micro_score(graded).stderr == pytest.approx(micro_score(plain).stderr)


def test_weights_make_the_mean_one_over_parts() -> None:
    """Two prompts with 1 and 3 instructions, of which 1 and 1 are followed: 2 of 4, not the mean of 1 and 1/3."""
    rows = [Outcome("a", 0, True, score=1.0, weight=1.0), Outcome("a", 1, False, score=1 / 3, weight=3.0)]
    score = micro_score(rows)
    assert score.accuracy == pytest.approx(0.5)
    # By hand: the ratio of sums (1 + 1) / (1 + 3), residuals 1 - 0.5 and 1 - 1.5, each squared 0.25.
    assert score.stderr == pytest.approx(math.sqrt(2 / 1 * (0.25 + 0.25)) / 4)


def test_macro_average_of_grades() -> None:
    rows = outcomes([0.2, 0.4], "law") + outcomes([0.9, 0.7, 0.8], "art")
    summary = summarize_outcomes(rows, Groups())
    assert summary.macro.accuracy == pytest.approx((0.3 + 0.8) / 2)
    assert summary.micro.accuracy == pytest.approx(3.0 / 5)


def test_the_paired_t_test_is_scipys() -> None:
    before, after = pairs(1, 60)
    found = compare_grades(outcomes(before), outcomes(after), Groups(), GATE)
    expected = ttest_rel(before, after)
    assert found.micro.p_value == pytest.approx(float(expected.pvalue))
    assert found.paired_z == pytest.approx(float(expected.statistic))
    assert found.micro.drop_pp == pytest.approx(100 * (np.mean(before) - np.mean(after)))
    assert found.micro.num_lost + found.micro.num_gained <= 60


def test_the_bootstrap_is_that_of_questions_drawn_one_by_one() -> None:
    before, after = map(np.array, pairs(2, 40))
    found = bootstrap_grades(GradedStrata.micro([PairedGrades(tuple(before), tuple(after))]), GATE)
    change, retention = found.drop, found.retention
    generator = np.random.default_rng(7)
    places = generator.integers(0, 40, (20_000, 40))
    low, high = np.percentile((before - after)[places].mean(axis=1), [2.5, 97.5])
    assert change.low == pytest.approx(low, abs=0.003)
    assert change.high == pytest.approx(high, abs=0.003)
    assert retention is not None
    ends = np.percentile(after[places].mean(axis=1) / before[places].mean(axis=1), [2.5, 97.5])
    assert [retention.low, retention.high] == pytest.approx(list(ends), abs=0.006)


def test_verdicts_at_both_sides_of_the_tolerance() -> None:
    def outcome(shift: float, tolerance: float) -> str:
        before, after = pairs(3, 200, shift=shift, noise=0.02)
        strata = GradedStrata.micro([PairedGrades(tuple(before), tuple(after))])
        return judge_grades(strata, "micro", GateSettings(max_drop_pp=tolerance)).outcome

    assert outcome(0.0, 2) == "within"
    assert outcome(0.1, 2) == "exceeds"
    assert outcome(0.02, 1.8) == "undecided"


def test_equal_runs_are_not_surer_than_their_number_allows() -> None:
    same = PairedGrades((0.5,) * 50, (0.5,) * 50)
    bounds = GradedStrata.micro([same]).bounds(0.95)
    assert bounds.high == pytest.approx(1 - 0.05 ** (1 / 50))
    few = judge_grades(GradedStrata.micro([same]), "micro", GateSettings(max_drop_pp=1))
    assert few.outcome == "undecided"
    assert few.num_needed is not None
    assert few.num_needed > 50
    many = GradedStrata.micro([PairedGrades((0.5,) * 400, (0.5,) * 400)])
    assert judge_grades(many, "micro", GateSettings(max_drop_pp=1)).outcome == "within"


def test_answers_that_all_differ_by_the_same() -> None:
    strata = GradedStrata.micro([PairedGrades((0.75,) * 40, (0.5,) * 40)])
    bounds = strata.bounds(0.95)
    assert 0.2 < bounds.low < 0.25 < bounds.high < 0.3
    assert judge_grades(strata, "micro", GateSettings(max_drop_pp=5)).outcome == "exceeds"


def test_bounds_hold_as_often_as_they_say() -> None:
    """Grades that differ for one question in ten only, of which a plain t bound holds 89 % of the time."""
    generator = np.random.default_rng(11)
    held = plain = 0
    for _ in range(1000):
        after = np.where(generator.uniform(size=80) < 0.1, generator.uniform(0, 1, 80), 0.0)
        strata = GradedStrata.micro([PairedGrades((0.0,) * 80, tuple(after))])
        held += strata.bounds(0.95).low <= -0.05
        drop, error = strata.moments(0)
        plain += drop - t.ppf(0.95, 79) * error <= -0.05
    assert plain / 1000 < 0.92
    assert 0.94 <= held / 1000 <= 0.98


def test_one_more_difference_is_counted_on_each_side() -> None:
    before, after = pairs(5, 30)
    strata = GradedStrata.micro([PairedGrades(tuple(before), tuple(after))])
    found = [one - other for one, other in zip(before, after, strict=True)]
    largest = max(map(abs, found))
    for side in (-1, 1):
        more = [*found, side * largest]
        expected = (statistics.mean(more), statistics.stdev(more) / math.sqrt(31))
        assert strata.moments(side) == pytest.approx(expected)
    halves = [PairedGrades(tuple(before[at::2]), tuple(after[at::2])) for at in (0, 1)]
    together = GradedStrata.macro(halves)
    assert together.num_effective == pytest.approx(30)
    assert together.moments(1)[0] == pytest.approx(strata.moments(1)[0])


def test_subjects_weigh_alike_in_the_macro_average() -> None:
    one, other = PairedGrades((1.0, 1.0), (0.5, 0.5)), PairedGrades((1.0,) * 8, (1.0,) * 8)
    assert GradedStrata.macro([one, other]).drop == pytest.approx(0.25)
    assert GradedStrata.micro([one, other]).drop == pytest.approx(0.1)
    singles = GradedStrata.macro([PairedGrades((1.0,), (0.0,)), PairedGrades((1.0,), (1.0,)), other])
    assert singles.drop == pytest.approx(1 / 3)
    assert sum(singles.weights) == pytest.approx(1)


def test_right_and_wrong_are_still_counted() -> None:
    rights = [Outcome("law", index, index % 2 == 0) for index in range(10)]
    assert not has_grades(rights)
    assert has_grades(rights, outcomes([0.5]))
    assert compare_outcomes(rights, rights, Groups(), GATE).micro.num_lost == 0


# ---- files ----


def graded_task() -> Task:
    """Answers are graded by how many of four letters they share with the key's place in the alphabet."""
    task = make_task()
    rule = Rule("share of letters", lambda text, sample: text or None, grade=grade)
    prepared = dataclasses.replace(task.prepared, rules={"share": rule})
    return dataclasses.replace(task, prepared=prepared)


def grade(text: str, sample: Sample) -> float:
    return text.count(sample.answer) / 4


def write_graded(folder: Path, texts: list[str], identity=IDENTITY) -> Path:
    task = graded_task()
    answers = [
        Answer(
            sample.subject,
            sample.index,
            completion=text.replace("?", sample.answer),
            prompt_hash=f"p{place}",
            stop_reason="eos",
        )
        for place, (sample, text) in enumerate(zip(task.samples, texts, strict=True))
    ]
    write_report(make_result(task, answers, fingerprint(task, identity, 2048)), folder)
    return folder


def test_a_graded_run_is_written_read_back_and_compared(tmp_path: Path) -> None:
    before = write_graded(tmp_path / "a", ["????", "???", "??", "?"] * 3)
    after = write_graded(tmp_path / "b", ["???", "???", "?", ""] * 3, INT4)
    results = json.loads((before / "results.json").read_text(encoding="utf-8"))
    assert results["is_graded"] is True
    assert results["accuracy_micro"] == pytest.approx(0.625)
    report = (before / "report.md").read_text(encoding="utf-8")
    assert "mean grade, %" in report
    assert "accuracy, %" not in report
    runs = [read_run(before), read_run(after)]
    assert [row.status for row in runs[1].rows[:4]] == ["graded", "graded", "graded", "unparsed"]
    assert [row.score for row in runs[0].rows[:4]] == [1.0, 0.75, 0.5, 0.25]
    compared = compare_pair(match(*runs), Groups(), GATE)
    assert compared.comparison.micro.drop_pp == pytest.approx(100 * (0.625 - 0.4375))
    assert (compared.comparison.micro.num_lost, compared.comparison.micro.num_gained) == (9, 0)
    whole = ComparisonReport(("FP32", "INT4"), {"quiz": compared})
    text = markdown(whole, GATE)
    assert "paired t test" in text
    assert "## Mean grade" in text
    assert "(t bound of grades)" in text
    assert "score test" not in text
    page = flips_page(whole, {})
    assert page.count('<article class="is-lost"') == 9
    assert "0.500" in page


def test_grades_that_were_changed_are_refused(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "a", ["????", "???", "??", "?"] * 3)
    path = folder / "answers.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    for change, message in (
        ({"score": 2}, "`score` is 2, but that of a `graded` answer is a number from 0 to 1"),
        ({"score": 0.1}, "its scores add up to 6.6, but results.json beside it counts 7.5"),
    ):
        row = {name: value for name, value in json.loads(lines[0]).items() if name != "checksum"} | change
        path.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=message.replace("(", r"\(")):
            read_run(folder)


def test_an_exam_with_grades_tells_not_what_is_kept(tmp_path: Path) -> None:
    exam = BenchmarkSettings(name="longbench", data_dir="sample")
    with pytest.raises(ConfigError, match=r"`retention.exam` is `longbench`, whose answers have grades"):
        Exam(exam, tmp_path, cast(Any, None), cast(Any, None), name="glm-tiny")
