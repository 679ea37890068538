"""Averages and standard errors, and the published averages they must reproduce."""

from __future__ import annotations

import math

import pytest

from evaluation.benchmarks.benchmark import subject_table
from evaluation.benchmarks.tasks import BENCHMARKS
from evaluation.metrics import Groups, Outcome, binomial_stderr, summarize_outcomes
from evaluation.reporting.published import published_tables


def outcomes(correct: dict[str, tuple[int, int]]) -> list[Outcome]:
    """Subject to (right answers, questions)."""
    return [
        Outcome(subject, index, is_correct=index < right)
        for subject, (right, count) in correct.items()
        for index in range(count)
    ]


def test_micro_weighs_questions_and_macro_subjects() -> None:
    summary = summarize_outcomes(outcomes({"a": (1, 2), "b": (6, 8)}), Groups())
    assert summary.micro.accuracy == pytest.approx(7 / 10)
    assert summary.macro.accuracy == pytest.approx((1 / 2 + 6 / 8) / 2)
    assert summary.subjects["b"].num_samples == 8
    assert summary.micro.stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
    parts = [binomial_stderr(0.5, 2), binomial_stderr(0.75, 8)]
    assert summary.macro.stderr == pytest.approx(math.sqrt(sum(part**2 for part in parts if part)) / 2)
    assert summary.accuracy == summary.micro.accuracy
    assert summary.stderr == summary.micro.stderr


def test_one_question_has_no_standard_error() -> None:
    summary = summarize_outcomes(outcomes({"a": (1, 1), "b": (6, 8)}), Groups())
    assert summary.subjects["a"].stderr is None
    assert summary.macro.stderr is None
    assert summary.micro.stderr is not None


def test_unparsed_and_truncated_are_counted_everywhere() -> None:
    rows = [
        Outcome("a", 0, is_correct=True),
        Outcome("a", 1, is_correct=False, is_unparsed=True, is_truncated=True),
        Outcome("b", 0, is_correct=False, is_truncated=True),
    ]
    summary = summarize_outcomes(rows, Groups(categories={"a": "x", "b": "y"}))
    assert (summary.micro.num_unparsed, summary.micro.num_truncated) == (1, 2)
    assert (summary.macro.num_unparsed, summary.macro.num_truncated) == (1, 2)
    assert summary.subjects["b"].num_truncated == 1
    assert summary.categories["x"].num_unparsed == 1


def test_bbh_averages_over_27_files_and_23_tasks() -> None:
    tasks = subject_table("bbh")
    right = {name: (10 if "task" in facts else 0, 10) for name, facts in tasks.items()}
    summary = summarize_outcomes(outcomes(right), BENCHMARKS["bbh"].groups("test"))
    assert summary.headline == "accuracy_macro"
    assert summary.macro.accuracy == pytest.approx(6 / 27)
    assert summary.further["accuracy_macro_23"].accuracy == pytest.approx(2 / 23)
    assert len(summary.subjects) == 27


def test_averages_of_absent_subjects_are_left_out() -> None:
    summary = summarize_outcomes(outcomes({"navigate": (1, 2)}), BENCHMARKS["bbh"].groups("test"))
    assert summary.further == {}


def test_ceval_hard_is_the_mean_of_eight_subjects() -> None:
    table = subject_table("ceval")
    right = {name: (facts["val"] if facts.get("hard") else 0, facts["val"]) for name, facts in table.items()}
    summary = summarize_outcomes(outcomes(right), BENCHMARKS["ceval"].groups("val"))
    assert summary.further["hard"].accuracy == 1.0
    assert summary.macro.accuracy == pytest.approx(8 / 52)
    assert sum(bool(facts.get("hard")) for facts in table.values()) == 8


def published(benchmark: str, models: list[str]) -> list[tuple[str, float, dict[str, float]]]:
    rows = []
    for table in published_tables():
        if (table["benchmark"], table["split"]) == (benchmark, "test") and table["categories"]:
            for model, (average, *parts) in table["rows"].items():
                if model in models:
                    rows.append((model, average, dict(zip(table["categories"], parts, strict=True))))
    assert len(rows) == len(models)
    return rows


def spread(benchmark: str, categories: dict[str, str], percent: dict[str, float]) -> list[Outcome]:
    """Answer so many questions right that every category has its published accuracy, to one question."""
    table = subject_table(benchmark)
    rows: list[Outcome] = []
    for category, wanted in percent.items():
        names = [name for name in table if categories[name] == category]
        owed = 0.0
        for name in names:
            count = table[name]["test"]
            owed += wanted / 100 * count
            right = min(count, round(owed))
            owed -= right
            rows += outcomes({name: (right, count)})
    return rows


MMLU_MODELS = ["chatglm-6b", "chatglm2-6b-base", "chatglm2-6b", "chatglm2-12b-base"]


@pytest.mark.parametrize(("model", "average", "parts"), published("mmlu", MMLU_MODELS))
def test_published_mmlu_averages_follow_from_their_categories(
    model: str, average: float, parts: dict[str, float]
) -> None:
    """Every question weighs the same, anatomy in STEM; Hendrycks' categories miss by a tenth."""
    groups = BENCHMARKS["mmlu"].groups("test")
    summary = summarize_outcomes(spread("mmlu", dict(groups.categories), parts), groups)
    assert 100 * summary.micro.accuracy == pytest.approx(average, abs=0.015), model
    for category, wanted in parts.items():
        assert 100 * summary.categories[category].accuracy == pytest.approx(wanted, abs=0.02)
    table = subject_table("mmlu")
    other_map = {name: facts.get("hendrycks", facts["category"]) for name, facts in table.items()}
    other = summarize_outcomes(spread("mmlu", other_map, parts), Groups(categories=other_map))
    assert abs(100 * other.micro.accuracy - average) > 0.08
    assert abs(100 * summary.macro.accuracy - average) > 0.1


CEVAL_MODELS = ["chatglm-6b", "chatglm2-6b-base", "chatglm2-6b", "chatglm2-12b-base", "chatglm2-12b"]


@pytest.mark.parametrize(("model", "average", "parts"), published("ceval", CEVAL_MODELS))
def test_published_ceval_averages_follow_from_their_categories(
    model: str, average: float, parts: dict[str, float]
) -> None:
    """The mean over the 52 subjects, not over questions."""
    groups = BENCHMARKS["ceval"].groups("test")
    rows = [
        Outcome(name, index, is_correct=index < 10 * parts[facts["category"]])
        for name, facts in subject_table("ceval").items()
        for index in range(1000)
    ]
    summary = summarize_outcomes(rows, groups)
    assert summary.headline == "accuracy_macro"
    assert 100 * summary.macro.accuracy == pytest.approx(average, abs=0.06), model
    assert set(summary.categories) == set(parts)
    for category, wanted in parts.items():
        assert 100 * summary.categories[category].accuracy == pytest.approx(wanted, abs=1e-9)


def test_ceval_on_val_is_reported_over_questions_as_chatglm2_does() -> None:
    table = subject_table("ceval")
    left, right = 721, {}
    for name, facts in table.items():
        right[name] = (min(left, facts["val"]), facts["val"])
        left -= right[name][0]
    summary = summarize_outcomes(outcomes(right), BENCHMARKS["ceval"].groups("val"))
    assert round(100 * summary.accuracy, 2) == 53.57
    assert round(100 * (summary.stderr or 0), 2) == 1.36


def test_mmlu_prints_hendrycks_categories_too() -> None:
    table = subject_table("mmlu")
    right = {
        name: (facts["test"] if name == "anatomy" else 0, facts["test"]) for name, facts in table.items()
    }
    summary = summarize_outcomes(outcomes(right), BENCHMARKS["mmlu"].groups("test"))
    assert summary.categories["STEM"].num_samples == 3153
    stem, other = summary.further.values()
    assert (stem.num_samples, other.num_samples) == (3018, 3242)
    assert stem.accuracy == 0
    assert other.accuracy == pytest.approx(135 / 3242)
