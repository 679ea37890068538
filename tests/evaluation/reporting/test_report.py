"""Results and reports: figures, titles, tables, chart, page, submission."""

from __future__ import annotations

import dataclasses
import html
import json
import re

import pytest

from evaluation.answer import Answer
from evaluation.metrics import Groups
from evaluation.reporting.files import read_results, tables, write_report
from evaluation.reporting.mistakes import mistakes_page
from evaluation.reporting.published import published_row, published_tables
from evaluation.reporting.results import make_result, results_json
from evaluation.reporting.submission import check_submission, submission
from evaluation.running.fingerprint import fingerprint
from evaluation.running.runner import run_task
from glmtune.errors import DataError
from tests.evaluation.doubles import IDENTITY, TableBackend, make_task


def result_of(task, tmp_path, backend=None):
    backend = backend or TableBackend()
    finished = run_task(task, backend, tmp_path / "run")
    return make_result(
        task, finished.answers, fingerprint(task, backend.identity, backend.max_context_tokens)
    )


def test_results_hold_what_the_issue_lists(tmp_path):
    values = results_json(result_of(make_task(), tmp_path))
    assert {
        "benchmark", "protocol", "num_samples", "accuracy_micro", "accuracy_macro", "stderr", "num_unparsed",
        "num_truncated", "categories", "subjects", "fingerprint",
    } <= set(values)  # fmt: skip
    # Completions of the table: A (gold A), B (gold B), nothing (gold C, truncated), D (gold D), ...
    assert values["num_samples"] == 12
    assert values["num_unparsed"] == values["num_truncated"] == 3
    assert values["accuracy_micro"] == pytest.approx(9 / 12)
    assert values["accuracy_macro"] == pytest.approx((4 / 5 + 5 / 7) / 2)
    assert values["subjects"]["law"]["accuracy"] == pytest.approx(4 / 5)
    assert values["subjects"]["law"]["num_samples"] == 5
    assert values["categories"]["Soft"]["accuracy"] == pytest.approx(5 / 7)
    assert values["stderr"] == pytest.approx((0.75 * 0.25 / 11) ** 0.5)
    assert values["rules"]["strict"]["accuracy_micro"] == pytest.approx(3 / 12)
    assert values["rule"] == "official"
    print_ = values["fingerprint"]
    assert {"data_hash", "prompt_hash", "protocol_version", "model", "decoding"} <= set(print_)
    assert print_["model"]["quantization"] == "none"
    assert print_["decoding"]["max_new_tokens"] == 16


def test_further_averages_stand_beside(tmp_path):
    groups = Groups(further={"accuracy_macro_23": [["law", "art"]], "hard": [["law"]]})
    values = results_json(result_of(make_task(groups=groups), tmp_path))
    assert values["accuracy_macro_23"] == pytest.approx((4 / 5 + 5 / 7) / 2)
    assert values["further"]["hard"]["accuracy"] == pytest.approx(4 / 5)
    assert "hard" not in values


def test_results_are_the_same_bytes_every_time(tmp_path):
    result = result_of(make_task(), tmp_path)
    write_report(result, tmp_path / "a")
    finished = run_task(make_task(), TableBackend(reverse=True), tmp_path / "b-run")
    again = make_result(make_task(), finished.answers, result.fingerprint)
    write_report(again, tmp_path / "b")
    for name in ("results.json", "answers.jsonl", "report.md", "mistakes.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_results(tmp_path / "a" / "results.json")["num_samples"] == 12
    with pytest.raises(DataError, match=r"report.md: it cannot be read as a result"):
        read_results(tmp_path / "a" / "report.md")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="`fingerprint` is missing"):
        read_results(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({}, "Quiz val, test: table"),
        ({"is_sample_set": True}, "SAMPLE Quiz val"),
        ({"is_partial": True}, "PARTIAL Quiz val"),
        ({"is_sample_set": True, "is_partial": True}, "SAMPLE PARTIAL Quiz val"),
    ],
)
def test_titles_say_what_may_not_be_compared(changes, start, tmp_path):
    result = result_of(make_task(**changes), tmp_path)
    assert result.title.startswith(start)
    assert result.is_comparable is not bool(changes)
    caption = tables(result)[0].caption
    assert ("not comparable with published figures" in caption) is bool(changes)


def test_markdown_and_chart_are_written(tmp_path):
    files = {path.name for path in write_report(result_of(make_task(), tmp_path), tmp_path / "out")}
    assert files == {"results.json", "report.md", "chart.png", "mistakes.html", "answers.jsonl"}
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| micro average | 12 | 75.00 | 46.77–91.11 | 3 | 3 |" in text
    assert "| Soft | 7 | 71.43 |" in text
    assert "| strict | 25.00 |" in text
    assert (tmp_path / "out" / "chart.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows[:4]] == ["correct", "correct", "unparsed", "correct"]
    assert rows[0]["gold"] == "A"
    assert "seconds" not in rows[0]


def test_the_page_shows_mistakes_escaped(tmp_path):
    task = make_task()
    evil = dataclasses.replace(task.samples[2], question="<script>alert(1)</script> & $$title?")
    task = dataclasses.replace(task, samples=(*task.samples[:2], evil, *task.samples[3:]))
    answers = [
        Answer(sample.subject, sample.index, completion="A <b>", stop_reason="eos") for sample in task.samples
    ]
    answers[2] = Answer("law", 2, completion="</pre><img src=x>", stop_reason="length")
    page = mistakes_page(make_result(task, answers, fingerprint(task, IDENTITY, None)))
    assert "<script>alert" not in page
    assert html.escape("<script>alert(1)</script> & $$title?") in page
    assert "<img" not in page
    assert "A &lt;b&gt;" in page
    assert len(re.findall("<article", page)) == 8
    assert 'class="is-unparsed is-truncated"' in page
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert "未能提取答案" in page


def test_answers_that_could_not_be_compared_are_told_apart(tmp_path):
    """`B` is what no comparison comes to an end with: unknown, counted as wrong, and asked of once."""
    asked: list[str] = []

    def matches(extracted, sample):
        asked.append(extracted)
        return None if extracted == "B" else extracted == sample.answer

    task = make_task()
    rules = {name: dataclasses.replace(rule, matches=matches) for name, rule in task.rules.items()}
    task = dataclasses.replace(task, prepared=dataclasses.replace(task.prepared, rules=rules))
    result = result_of(task, tmp_path)
    values = results_json(result)
    # In 12 questions: "it is B or A" four times, "B" three times, nothing three times, "C, no: D" twice.
    assert values["num_undecided"] == 3
    assert values["accuracy_micro"] == pytest.approx(6 / 12)
    assert values["num_unparsed"] == 3
    assert "3 of 12 answers could not be compared" in tables(result)[0].caption
    page = mistakes_page(result)
    assert page.count('class="is-wrong is-undecided"') == 3
    assert "未能及时比较" in page
    write_report(result, tmp_path / "report")
    lines = (tmp_path / "report" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    marked = [row for row in map(json.loads, lines) if row.get("undecided")]
    assert [row["status"] for row in marked] == ["wrong"] * 3
    # Both rules read `B` in three answers, and ask once; `A`, `B` and `C`, `D` are two questions each.
    asked.clear()
    make_result(task, [each.answer for each in result.judgements], result.fingerprint)
    assert len(asked) == 4 * 2 + 3 * 1 + 2 * 2


def test_without_such_answers_nothing_is_said_of_them(tmp_path):
    result = result_of(make_task(), tmp_path)
    assert "num_undecided" not in results_json(result)
    assert "compared" not in tables(result)[0].caption
    assert "undecided" not in mistakes_page(result)


def test_a_long_page_is_thinned_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.reporting.mistakes.MAX_SHOWN", 2)
    page = mistakes_page(result_of(make_task(), tmp_path))
    assert len(re.findall("<article", page)) == 2
    assert "shown: 2 of 3" in page


def test_too_long_questions_are_unparsed_and_said(tmp_path):
    task = make_task("choices", sizes={"law": 2, "a much longer subject": 2}, num_fewshot=2)
    backend = TableBackend(context=len(task.prompt(task.samples[0], 1).text) + 1)
    result = result_of(task, tmp_path, backend)
    values = results_json(result)
    assert (values["num_too_long"], values["num_shortened"], values["num_unparsed"]) == (0, 4, 0)
    shorter = TableBackend(context=len(task.prompt(task.samples[0], 0).text) + 1)
    result = result_of(task, tmp_path / "shorter", shorter)
    values = results_json(result)
    assert (values["num_too_long"], values["num_shortened"], values["num_unparsed"]) == (2, 2, 2)
    assert "2 questions fit no context" in tables(result)[0].caption
    assert "no context of the model holds this question" in mistakes_page(result)


class TestSubmission:
    @pytest.fixture
    def task(self):
        sizes = {f"subject_{number}": 2 for number in range(52)}
        task = make_task("choices", sizes=sizes, benchmark="ceval", split="test", labelled=False)
        samples = tuple(
            dataclasses.replace(each, row_id=str(each.index + 10), answer="") for each in task.samples
        )
        return dataclasses.replace(task, samples=samples)

    def test_all_subjects_by_row_id_and_no_accuracy(self, task, tmp_path):
        result = result_of(task, tmp_path)
        write_report(result, tmp_path / "out")
        written = json.loads((tmp_path / "out" / "submission.json").read_text(encoding="utf-8"))
        assert len(written) == 52
        assert written["subject_0"] == {"10": "A", "11": "B"}
        values = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
        assert (
            values["accuracy_micro"]
            is values["stderr"]
            is values["subjects"]["subject_0"]["accuracy"]
            is None
        )
        assert not (tmp_path / "out" / "chart.png").exists()
        assert "submission.json is what the server scores" in tables(result)[0].caption

    def test_a_part_is_no_submission(self, task, tmp_path):
        part = dataclasses.replace(task, samples=task.samples[:10], is_partial=True)
        result = result_of(part, tmp_path)
        write_report(result, tmp_path / "out")
        assert not (tmp_path / "out" / "submission.json").exists()
        with pytest.raises(DataError, match=r"has 5 subjects, but C-Eval's server wants all 52"):
            submission(result)

    def test_wrong_rows_and_letters_are_refused(self):
        letters = {f"s{number}": {"0": "A"} for number in range(52)}
        rows = {name: {"0"} for name in letters}
        check_submission(letters, rows)
        with pytest.raises(DataError, match=r"1 rows of `s3`, but the test split has 2"):
            check_submission(letters, {**rows, "s3": {"0", "1"}})
        with pytest.raises(DataError, match=r"answers `s3` 0 with `E`"):
            check_submission({**letters, "s3": {"0": "E"}}, rows)


def test_the_published_row_of_the_same_model_stands_beside(tmp_path):
    task = make_task(benchmark="ceval", split="val")
    values = fingerprint(task, dataclasses.replace(IDENTITY, name="/models/chatglm2-6b/"), 100)
    answers = run_task(task, TableBackend(), tmp_path / "run").answers
    table = tables(make_result(task, answers, values))[0]
    assert table.columns[-1] == "published"
    assert {row[0]: row[-1] for row in table.rows}["micro average"] == "53.57"
    assert "Published: THUDM/ChatGLM2-6B README" in table.caption
    partial = dataclasses.replace(task, is_partial=True)
    assert tables(make_result(partial, answers, values))[0].columns[-1] == "truncated"


@pytest.mark.parametrize(
    ("changes", "average"),
    [
        ({"name": "THUDM/chatglm2-6b"}, 53.57),
        ({"name": "ChatGLM2-6B-int4", "quantization": "int4"}, 50.30),
        ({"name": "chatglm2-6b", "quantization": "int4"}, 50.30),
        ({"name": "chatglm2-6b", "adapter": "abc"}, None),
        ({"name": "chatglm2-6b-mine"}, None),
    ],
)
def test_only_the_same_model_is_looked_up(changes, average):
    row = published_row("ceval", "val", dataclasses.asdict(dataclasses.replace(IDENTITY, **changes)))
    assert (row and row.average) == average


def test_published_tables_are_whole():
    assert published_tables()
    for table in published_tables():
        assert {"benchmark", "split", "source", "note", "average", "categories", "rows"} == set(table) - {
            "num_samples"
        }
        for model, values in table["rows"].items():
            assert len(values) == 1 + len(table["categories"]), model
