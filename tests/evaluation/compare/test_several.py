"""Tables of several runs: each against each, and training seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy import stats

from evaluation.compare.pairing.match import check_comparable
from evaluation.compare.pairing.runs import read_run
from evaluation.compare.reporting.matrix import matrix_json, matrix_tables, welch_p, write_matrix
from evaluation.compare.settings import ImportSettings
from evaluation.compare.several import compare_each, plain_pair, read_sides
from glmtune.errors import ConfigError, DataError
from tests.evaluation.compare.cases import compared, own_task, write_run
from tests.evaluation.doubles import IDENTITY

PLAIN = ImportSettings()


def runs(tmp_path: Path, *wrong: Sequence[int], sizes: dict[str, int] | None = None) -> list[str]:
    task = own_task(sizes or {"law": 20, "art": 20})
    return [
        str(
            write_run(
                tmp_path / f"run{place}",
                task,
                dataclasses.replace(IDENTITY, weights_hash=f"w{place}"),
                wrong=each,
            )
        )
        for place, each in enumerate(wrong)
    ]


def test_every_two_runs_are_paired_and_corrected_together(tmp_path: Path) -> None:
    matrix = compared(runs(tmp_path, (), (1, 4), range(15)))
    found = matrix.benchmarks["quiz"]
    assert list(found.pairs) == [(0, 1), (0, 2), (1, 2)]
    assert [round(each.difference_pp, 6) for each in found.pairs.values()] == [5.0, 37.5, 32.5]
    assert [(each.num_first, each.num_second) for each in found.pairs.values()] == [(2, 0), (15, 0), (13, 0)]
    ps = [each.p_value for each in found.pairs.values()]
    assert found.pairs[0, 2].p_holm == pytest.approx(3 * ps[1])
    assert found.pairs[1, 2].p_holm == pytest.approx(2 * ps[2])
    assert found.pairs[0, 1].p_holm == pytest.approx(ps[0])
    text = "\n".join(table.to_markdown() for table in matrix_tables(matrix))
    assert "| A | 100.00 | – | +5.00 (" in text
    assert "| C | 62.50 | -37.50 (" in text
    assert "Holm's correction over the 3 pairs" in text
    assert "| A − C | +37.50 |" in text
    assert ") * |" in text


def test_clusters_change_the_error_and_say_how_many(tmp_path: Path) -> None:
    names = runs(tmp_path, (), range(8), sizes={name: 5 for name in "abcdefgh"})
    alone = compared(names).benchmarks["quiz"].pairs[0, 1]
    found = compared(names, cluster="subject").benchmarks["quiz"].pairs[0, 1]
    assert found.difference_pp == pytest.approx(alone.difference_pp)
    assert (found.num_clusters, alone.num_clusters) == (8, None)
    assert found.high_pp - found.low_pp > alone.high_pp - alone.low_pp
    with pytest.raises(DataError, match="name none"):
        compared(names, cluster="cluster")


def test_the_macro_average_can_be_asked_for(tmp_path: Path) -> None:
    names = runs(tmp_path, (), (0, 1), sizes={"law": 4, "art": 12})
    assert compared(names).benchmarks["quiz"].pairs[0, 1].difference_pp == pytest.approx(100 * 2 / 16)
    found = compared(names, average="accuracy_macro").benchmarks["quiz"]
    assert found.pairs[0, 1].difference_pp == pytest.approx(100 * (2 / 4) / 2)
    assert found.scores[1].accuracy == pytest.approx(0.75)


def test_several_benchmarks_are_pooled(tmp_path: Path) -> None:
    names = []
    for place, wrong in enumerate(((), (1, 4), (0, 1, 2))):
        for benchmark in ("quiz", "riddle"):
            identity = dataclasses.replace(IDENTITY, weights_hash=f"w{place}")
            task = own_task({"law": 10, "art": 10}, benchmark)
            write_run(tmp_path / f"model{place}" / benchmark, task, identity, wrong=wrong)
        names.append(str(tmp_path / f"model{place}"))
    matrix = compared(names)
    assert list(matrix.benchmarks) == ["quiz", "riddle"]
    assert matrix.pooled[0, 2].mean.difference_pp == pytest.approx(15)
    assert matrix.pooled[0, 2].p_exact == pytest.approx(2 * 0.5**6)
    text = "\n".join(table.to_markdown() for table in matrix_tables(matrix))
    assert "the 3 pairs on all 2 benchmarks (6 tests)" in text
    assert "## Pairs: all benchmarks" in text


def test_files_and_their_bytes(tmp_path: Path) -> None:
    names = runs(tmp_path, (), (1, 4), (2,))
    written = write_matrix(compared(names), tmp_path / "out", paper=True)
    assert {path.name for path in written} == {
        "compare.md", "compare.json", "tables.tex", "differences.png", "differences.svg", "differences.pdf",
    }  # fmt: skip
    before = {path: path.read_bytes() for path in written}
    write_matrix(compared(names), tmp_path / "out", paper=True)
    assert {path: path.read_bytes() for path in written} == before
    values = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert values["benchmarks"]["quiz"]["pairs"]["A - B"]["num_questions"] == 40
    assert matrix_json(compared(names))["runs"][2]["mark"] == "C"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "novel.txt").write_text("once", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"novel\.txt"):
        write_matrix(compared(names), tmp_path / "taken")


def test_other_questions_are_refused(tmp_path: Path) -> None:
    names = [*runs(tmp_path, ()), str(write_run(tmp_path / "other", own_task({"law": 5})))]
    with pytest.raises(DataError, match="they differ in data"):
        compared(names)
    with pytest.raises(ConfigError, match=r"twice\. Name different"):
        compared([names[0], names[0]])


def test_only_the_way_of_drawing_may_differ(tmp_path: Path) -> None:
    one, two = (read_run(Path(name)) for name in runs(tmp_path, (), (1,)))
    drawn = dataclasses.replace(
        two,
        results={
            **two.results,
            "fingerprint": {
                **two.fingerprint,
                "decoding": {**two.fingerprint["decoding"], "do_sample": True, "temperature": 0.8},
            },
        },
    )
    check_comparable(one, drawn, but=("do_sample",))
    with pytest.raises(DataError, match="do_sample: false and true"):
        check_comparable(one, drawn)


def test_two_plain_runs_have_a_verdict_and_others_a_table(tmp_path: Path) -> None:
    names = runs(tmp_path, (), (1,), (2,))
    pair = plain_pair(read_sides(names[:2], PLAIN, None))
    assert pair is not None
    assert [each["quiz"].folder for each in pair] == [Path(name) for name in names[:2]]
    assert plain_pair(read_sides(names, PLAIN, None)) is None


def test_settings_of_imports_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`imported` is given"):
        read_sides(runs(tmp_path, (), (1,)), ImportSettings(metric="acc"), None)


# ---- seeds


def test_seeds_are_averaged_question_by_question(tmp_path: Path) -> None:
    names = runs(tmp_path, (0, 1), (1, 2), (5,), (0, 1, 2, 3), (1, 2, 3, 4, 5))
    sides = ["+".join(names[:3]), "+".join(names[3:])]
    read = read_sides(sides, PLAIN, None)
    assert plain_pair(read) is None
    first = read[0]["quiz"]
    assert [outcome.value for outcome in first.outcomes[:3]] == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert first.metric == "mean of 3 runs"
    matrix = compare_each(read, sides, confidence=0.95, average=None, cluster=None)
    found = matrix.benchmarks["quiz"]
    changes = [
        one.value - two.value for one, two in zip(first.outcomes, read[1]["quiz"].outcomes, strict=True)
    ]
    assert found.pairs[0, 1].difference_pp == pytest.approx(100 * sum(changes) / 40)
    assert found.pairs[0, 1].p_value == pytest.approx(stats.ttest_1samp(changes, 0).pvalue)
    welch = stats.ttest_ind([0.95, 0.95, 0.975], [0.9, 0.875], equal_var=False).pvalue
    assert found.repeat_tests == {(0, 1): pytest.approx(welch)}
    text = "\n".join(table.to_markdown() for table in matrix_tables(matrix))
    assert "## Over runs: quiz" in text
    assert "3 and 2" in text
    assert ", sd 1.44 |" in text
    repeats = matrix_json(matrix)["benchmarks"]["quiz"]["repeats"]
    assert repeats == {"A": pytest.approx([0.95, 0.95, 0.975]), "B": pytest.approx([0.9, 0.875])}


def test_a_folder_with_a_plus_is_one_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mmlu+ceval", own_task({"law": 4}))
    (side,) = read_sides([str(folder)], PLAIN, None)
    assert side["quiz"].repeats == ()


def test_the_same_seed_twice_is_refused(tmp_path: Path) -> None:
    (name,) = runs(tmp_path, ())
    with pytest.raises(ConfigError, match="twice"):
        read_sides([f"{name}+{name}"], PLAIN, None)


def test_equal_runs_do_not_differ() -> None:
    assert welch_p([0.5, 0.5], [0.5, 0.5]) == 1.0
    assert welch_p([0.5, 0.5], [0.25, 0.25]) == 0.0
