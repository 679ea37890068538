"""What a comparison leaves behind: figures, tables, charts, the page of flips, the table of methods."""

from __future__ import annotations

import dataclasses
import html
import json
import re

import pytest

from evaluation.answer import Answer
from evaluation.backend import Drawing
from evaluation.compare.pairing.match import match
from evaluation.compare.pairing.questions import find_questions
from evaluation.compare.pairing.runs import read_run
from evaluation.compare.reporting.flips import flips_page
from evaluation.compare.reporting.methods import (
    Cost,
    MethodResult,
    cost_of,
    method_table,
    methods_json,
    rank_methods,
    write_methods,
)
from evaluation.compare.reporting.report import (
    compare_pair,
    comparison_json,
    markdown,
    write_comparison_files,
)
from evaluation.compare.reporting.tables import ComparisonReport
from evaluation.compare.settings import GateSettings
from evaluation.compare.statistics.perplexity import TextLoss
from evaluation.metrics import Groups
from evaluation.task import Task
from glmtune.errors import GlmtuneError
from tests.evaluation.compare.cases import INT4, write_run
from tests.evaluation.doubles import IDENTITY, make_task

GATE = GateSettings(num_resamples=300)
GROUPS = Groups(categories={"law": "Hard", "art": "Soft"})


def report_of(
    tmp_path, kind="generate_then_choices", wrong=((1, 4), (2, 4, 7)), **changes
) -> ComparisonReport:
    task = make_task(kind, **changes)
    folders = [
        write_run(tmp_path / name, task, identity, wrong=places)
        for name, identity, places in zip(("bf16", "int4"), (IDENTITY, INT4), wrong, strict=True)
    ]
    pair = match(*map(read_run, folders))
    return ComparisonReport(("BF16", "INT4"), {pair.benchmark: compare_pair(pair, GROUPS, GATE)})


def test_the_published_form_with_intervals(tmp_path):
    text = markdown(report_of(tmp_path), GATE)
    assert text.startswith("# BF16 → INT4: table\n\n- Quiz val, test (micro): not enough questions to tell")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == "|  | Quiz val, test, micro, % |"
    assert rows[2] == "| BF16 | 83.33 ± 11.24 |"
    assert rows[3] == "| INT4 | 75.00 ± 13.06 |"
    assert re.fullmatch(r"\| drop, points \| \+8.33 \(-\d+.\d\d to \+\d+.\d\d\) \|", rows[4])
    assert re.fullmatch(r"\| bounds, points \| -\d+.\d\d to \+\d+.\d\d \|", rows[5])
    assert rows[6].startswith("| retention, % | 90.00 (")
    assert "| quiz | 12 | 2 | 1 |" in text
    for heading in (
        "Tests on pairs", "Categories: quiz", "Shift of the choice probabilities", "Where greedy texts part",
        "Flips by margin: quiz", "What differs", "Why pairs", "Subjects: quiz",
    ):  # fmt: skip
        assert f"## {heading}" in text
    assert "| quantization | none | int4 |" in text


def test_the_report_says_why_pairs_are_needed(tmp_path):
    text = markdown(report_of(tmp_path), GATE)
    assert "z = 3.95" in text
    assert "z = 1.70" in text
    assert "Here: quiz: 25.0 % of the questions flipped, z = 0.51 unpaired, 0.58 paired." in text


def test_a_protocol_without_choices_shows_texts_alone(tmp_path):
    text = markdown(report_of(tmp_path, "generate"), GATE)
    assert "Where greedy texts part" in text
    assert "Shift of the choice probabilities" not in text
    assert "Flips by margin" not in text


def test_published_rows_stand_beside_measured_ones(tmp_path):
    """Only for the same model on the same split, whole."""
    task = make_task("choices", benchmark="ceval", split="val", sizes={"law": 4})
    names = dataclasses.replace(IDENTITY, name="THUDM/chatglm2-6b")
    four = dataclasses.replace(names, quantization="int4")

    def text(part: bool, task: Task = task) -> str:
        whole = dataclasses.replace(task, is_partial=part)
        runs = [
            write_run(tmp_path / f"{task.kind}{part}{name}", whole, identity)
            for name, identity in (("a", names), ("b", four))
        ]
        pair = match(*map(read_run, runs))
        return markdown(ComparisonReport(("BF16", "INT4"), {"ceval": compare_pair(pair, GROUPS, GATE)}), GATE)

    assert "| BF16, published | 53.57 |" in text(False)
    assert "| INT4, published | 50.30 |" in text(False)
    assert "published |" not in text(True)
    written = make_task("generate", benchmark="ceval", split="val", sizes={"law": 4})
    assert "| BF16, published | 53.57 |" in text(False, written)
    # Each of several drawn answers is a run, too; the published answers are the likeliest.
    assert "published |" not in text(False, written.drawn(Drawing(0.8)))
    assert text(True).startswith("# PARTIAL BF16 → INT4")


def test_json_has_every_figure_and_no_clock(tmp_path):
    report = report_of(tmp_path)
    values = json.loads(json.dumps(comparison_json(report, GATE), allow_nan=False))
    assert (values["outcome"], values["exit_code"]) == ("undecided", 4)
    assert values["labels"] == ["BF16", "INT4"]
    assert values["gate"]["max_drop_pp"] == 1.0
    quiz = values["benchmarks"]["quiz"]
    assert quiz["micro"]["drop_pp"] == pytest.approx(100 / 12)
    assert (quiz["micro"]["num_lost"], quiz["micro"]["num_gained"]) == (2, 1)
    assert quiz["micro"]["baseline"]["accuracy"] == pytest.approx(10 / 12)
    assert set(quiz["subjects"]) == {"law", "art"}
    assert set(quiz["categories"]) == {"Hard", "Soft"}
    assert quiz["verdict"]["num_needed"] > 12
    assert len(quiz["sensitivity"]["choices"]["margins"]) == 10
    assert quiz["sensitivity"]["texts"]["num_identical"] == 9
    assert quiz["runs"]["candidate"]["fingerprint"]["model"]["quantization"] == "int4"
    assert [round(each["z"], 2) for each in values["published"]] == [3.95, 1.7]
    assert "seconds" not in json.dumps(values)


def test_files_are_written_and_the_same_every_time(tmp_path):
    report = report_of(tmp_path)
    loss = TextLoss("a.txt", 100, 12.5, 13.0, 0.039, 0.01, 0.07)
    report = dataclasses.replace(report, text_loss=loss)
    names = [path.name for path in write_comparison_files(report, GATE, {}, tmp_path / "one")]
    assert names == ["compare.md", "compare.json", "flips.html", "drops.png", "flips_by_margin.png"]
    assert (tmp_path / "one" / "drops.png").read_bytes().startswith(b"\x89PNG")
    assert "| a.txt | 100 | 12.500 | 13.000 | +0.0390 (+0.0100 to +0.0700) |" in (
        tmp_path / "one" / "compare.md"
    ).read_text(encoding="utf-8")
    write_comparison_files(report, GATE, {}, tmp_path / "two")
    for name in ("compare.md", "compare.json", "flips.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    without = report_of(tmp_path / "texts", "generate")
    assert "flips_by_margin.png" not in [
        path.name for path in write_comparison_files(without, GATE, {}, tmp_path / "3")
    ]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    report = report_of(tmp_path)
    folder = tmp_path / "out"
    write_comparison_files(report, GATE, {}, folder)
    (folder / "drops.png").unlink()
    (folder / "drops.png").mkdir()
    with pytest.raises(GlmtuneError, match=r"drops.png cannot be written"):
        write_comparison_files(report, GATE, {}, folder)


class TestFlips:
    def test_lists_every_flip_both_ways_with_both_answers(self, tmp_path):
        task = make_task("generate_then_choices")
        report = report_of(tmp_path)
        page = flips_page(report, {"quiz": {each.key: each for each in task.samples}})
        assert re.findall(r'<article class="is-(\w+)" data-subject="([^"]+)">', page) == [
            ("gained", "quiz/law"),
            ("lost", "quiz/law"),
            ("lost", "quiz/art"),
        ]
        assert page.count("<h3>BF16</h3>") == page.count("<h3>INT4</h3>") == 3
        first = page.split("<article")[1]
        assert "law question 1?" in first
        assert "A. 1\nB. 2" in first
        assert re.search(r'wrong">C<.*right">B<', first, flags=re.DOTALL)
        assert "B 0.139" in first
        assert "http" not in page
        assert "答对变答错" in page

    def test_says_where_questions_are_not_at_hand(self, tmp_path):
        page = flips_page(report_of(tmp_path), {})
        assert "the data of these runs are not at hand" in page
        assert page.count("<article") == 3

    def test_escapes_what_models_and_data_say(self, tmp_path):
        task = make_task(sizes={"law": 2})
        evil = dataclasses.replace(task.samples[0], question="<script>alert(1)</script> $title")
        bad = Answer("law", 0, completion="</pre><img src=x> B", stop_reason="eos")
        good = Answer("law", 0, completion="A", stop_reason="eos")
        runs = [
            write_run(
                tmp_path / name, task, identity, answer=lambda place, _, first=first: None if place else first
            )
            for name, identity, first in (("a", IDENTITY, good), ("b", INT4, bad))
        ]
        pair = match(*map(read_run, runs))
        report = ComparisonReport(("<b>", "INT4"), {"quiz": compare_pair(pair, GROUPS, GATE)})
        page = flips_page(report, {"quiz": {evil.key: evil}})
        assert "<script>alert" not in page
        assert "<img" not in page
        assert "<h3><b>" not in page
        assert html.escape("<script>alert(1)</script> $title") in page

    def test_questions_are_found_by_their_hash(self, tmp_path):
        from evaluation.benchmarks.tasks import make_task as real_task

        task = real_task("bbh", data_dir="sample", limit=2)
        answers = [
            Answer(each.subject, each.index, completion=f"So the answer is {each.answer}.", stop_reason="eos")
            for each in task.samples
        ]
        folder = write_run(tmp_path / "bbh", task, answer=lambda place, _: answers[place])
        found = find_questions(read_run(folder), "sample")
        assert found == {each.key: each for each in task.samples}
        other = write_run(
            tmp_path / "other", task, answer=lambda place, _: answers[place], data_hash="0" * 64
        )
        assert find_questions(read_run(other), "sample") == {}
        assert find_questions(read_run(folder), str(tmp_path)) == {}
        assert find_questions(read_run(write_run(tmp_path / "quiz")), "sample") == {}


class TestMethods:
    @pytest.fixture
    def table(self, tmp_path):
        reports = {
            name: report_of(tmp_path / name, wrong=((1, 4), wrong))
            for name, wrong in (
                ("int4", (1, 4, 5, 6)),
                ("int8", (1, 4)),
                ("int4-g32", (1, 4, 5)),
                ("big", (1, 4)),
            )
        }
        costs = {
            "int4": Cost(500, 40.0),
            "int8": Cost(900, 20.0),
            "int4-g32": Cost(600, 30.0),
            "big": Cost(1000, None),
        }
        methods = [MethodResult(name, costs[name], report) for name, report in reports.items()]
        return rank_methods("BF16", Cost(2_000_000, 10.0), methods)

    def test_ranks_by_drop_size_and_speed(self, table):
        assert [each.name for each in table.methods] == ["int8", "big", "int4-g32", "int4"]
        assert table.front == {"int8", "int4-g32", "int4"}
        rows = method_table(table).rows
        assert rows[0][:4] == ("BF16 (baseline)", "2.0", "100.0", "10.00")
        assert rows[1][0] == "int8 ●"
        assert rows[2][0] == "big"
        assert rows[4][-2] == "4 / 1 / 1"
        assert rows[4][4].startswith("+16.67 (")
        assert table.outcome == "undecided"

    def test_one_correction_for_the_whole_table(self, table):
        p_values = {each.name: each.p_holm["quiz"] for each in table.methods}
        assert p_values["int8"] == 1.0
        assert p_values["int4"] == pytest.approx(min(1.0, 4 * 0.5))

    def test_is_written_with_its_plot(self, table, tmp_path):
        files = write_methods(table, "BF16 and candidates", tmp_path / "out")
        assert [path.name for path in files] == ["methods.md", "methods.json", "pareto.png"]
        assert files[2].read_bytes().startswith(b"\x89PNG")
        values = json.loads(files[1].read_text(encoding="utf-8"))
        assert values == json.loads(json.dumps(methods_json(table)))
        assert list(values["methods"]) == ["int8", "big", "int4-g32", "int4"]
        assert values["methods"]["int4"]["mean_drop_pp"] == pytest.approx(100 / 6)
        assert (values["outcome"], values["exit_code"]) == ("undecided", 4)

    def test_speed_comes_from_the_journals(self, tmp_path):
        run = read_run(write_run(tmp_path / "run"))
        assert cost_of([run, run], 77) == Cost(77, pytest.approx(24 / 12))
        (tmp_path / "run" / "journal-rank0.jsonl").unlink()
        assert cost_of([read_run(tmp_path / "run")], 77) == Cost(77, None)
