"""Runs read from folders: what may be compared, and everything that is refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from evaluation.answer import Answer
from evaluation.compare.build import Side, build_report, default_comparison_folder
from evaluation.compare.pairing.match import differences, labels, match
from evaluation.compare.pairing.runs import find_runs, read_run
from evaluation.compare.settings import GateSettings
from glmtune.errors import ConfigError, DataError
from tests.evaluation.compare.cases import INT4, write_run
from tests.evaluation.doubles import IDENTITY, make_task


@pytest.fixture
def before(tmp_path):
    return write_run(tmp_path / "bf16", wrong=[1, 4])


@pytest.fixture
def after(tmp_path):
    return write_run(tmp_path / "int4", identity=INT4, wrong=[2, 4, 7])


def rewrite(folder, change) -> None:
    """Edit answers by hand, the checksums of both files taken out."""
    results = folder / "results.json"
    values = json.loads(results.read_text(encoding="utf-8"))
    del values["checksum"], values["answers_checksum"]
    results.write_text(json.dumps(values), encoding="utf-8")
    path = folder / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["checksum"]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in change(rows)), encoding="utf-8"
    )


def test_two_runs_are_paired_question_by_question(before, after):
    pair = match(read_run(before), read_run(after))
    assert [row.answer.key for row, _ in pair.rows] == [row.answer.key for _, row in pair.rows]
    flipped = [place for place, (one, other) in enumerate(pair.rows) if one.status != other.status]
    assert flipped == [1, 2, 7]
    assert (pair.benchmark, pair.title, pair.what) == ("quiz", "Quiz val, test", "Quiz val, test")
    assert pair.is_comparable
    assert read_run(before).num_seconds == pytest.approx(6.0)


def test_order_of_rows_does_not_matter(before, after):
    rewrite(after, lambda rows: rows[::-1])
    pair = match(read_run(before), read_run(after))
    assert all(one.answer.key == other.answer.key for one, other in pair.rows)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda rows: rows[:-1], ["answers.jsonl", "it has 11 answers", "counts 12", "glmtune eval"]),
            (lambda rows: [*rows, rows[3]], ["line 13", "`law` 3 is there a second time", "line 4"]),
            (
                lambda rows: [rows[0] | {"status": "wrong"}, *rows[1:]],
                ["9 of its answers are right", "counts 10"],
            ),
            (lambda rows: [rows[0] | {"status": None}, *rows[1:]], ["line 1", "`status` is None"]),
            (lambda rows: [rows[0] | {"index": "x"}, *rows[1:]], ["line 1", '`index` is "x"']),
        ],
    )
    def test_damaged_answers(self, before, change, words):
        rewrite(before, change)
        with pytest.raises(DataError) as caught:
            read_run(before)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    def test_separators_inside_an_answer_end_no_line(self, before):
        strange = "one\u2028two\u2029three\u0085four\x1cfive"
        rewrite(before, lambda rows: [row | {"completion": strange} for row in rows])
        assert all(row.answer.completion == strange for row in read_run(before).rows)

    def test_answers_are_missing(self, before):
        (before / "answers.jsonl").unlink()
        with pytest.raises(DataError, match=r"answers.jsonl: it cannot be read .*glmtune eval"):
            read_run(before)

    def test_a_crashed_candidate(self, after):
        (after / "results.json").unlink()
        (after / "answers.jsonl").unlink()
        journal = after / "journal-rank0.jsonl"
        lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
        journal.write_text("".join(lines[:5]) + lines[5][:20], encoding="utf-8")
        with pytest.raises(DataError, match=r"int4: this run is not finished: 5 of 12 questions .* goes on"):
            find_runs(after)

    def test_no_run(self, tmp_path):
        with pytest.raises(ConfigError, match=r"`runs` names .*nowhere`, but this folder does not exist"):
            find_runs(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match="holds no run"):
            find_runs(tmp_path)

    def test_without_gold_answers(self, tmp_path):
        task = make_task(labelled=False)
        write_run(tmp_path / "test", task)
        with pytest.raises(DataError, match="has no gold answers, so there is no accuracy to compare"):
            read_run(tmp_path / "test")

    def test_the_same_run_twice(self, before):
        with pytest.raises(ConfigError, match="are the same run"):
            match(read_run(before), read_run(before))

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (
                {"task": make_task(sizes={"law": 5, "art": 6})},
                ["differ in data (num_samples: 12 and 11; data_hash: ", "same files, subjects"],
            ),
            ({"data_hash": "f00d" * 16}, ["differ in data (data_hash: ", " and f00df00df00d)"]),
            ({"split": "test"}, ['differ in data (split: "val" and "test")']),
            ({"prompt_hash": "beef" * 16}, ["differ in prompts (prompt_hash: ", "`is_chat`"]),
            ({"num_fewshot": 5}, ["differ in prompts (num_fewshot: 0 and 5)"]),
            (
                {"protocol_version": "other/1"},
                ['differ in protocol (protocol_version: "test/1" and "other/1")', "same `protocol`"],
            ),
            (
                {"decoding": {"do_sample": True, "max_new_tokens": 99, "stop": ["\nQ:"]}},
                ["protocol (max_new_tokens: 16 and 99; do_sample: false and true)"],
            ),
            (
                {"split": "test", "num_fewshot": 5},
                ["in data (split: ", "), in prompts (num_fewshot: 0 and 5)"],
            ),
        ],
    )
    def test_other_data_prompts_or_protocol(self, before, tmp_path, make, words):
        other = write_run(tmp_path / "other", identity=INT4, **make)
        with pytest.raises(DataError) as caught:
            match(read_run(before), read_run(other))
        text = str(caught.value)
        assert str(before) in text
        assert str(other) in text
        assert all(word in text for word in words), text

    def test_another_rule_decided(self, before, after):
        path = after / "results.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["checksum"]
        path.write_text(json.dumps(values | {"rule": "strict"}), encoding="utf-8")
        with pytest.raises(DataError, match=r'protocol \(rule: "official" and "strict"\)'):
            match(read_run(before), read_run(after))

    def test_other_questions_under_the_same_fingerprint(self, before, after):
        rewrite(after, lambda rows: [*rows[:-1], rows[-1] | {"index": 70}])
        with pytest.raises(
            DataError, match=r"2 questions have an answer in one of them alone \(first: `art` 6\)"
        ):
            match(read_run(before), read_run(after))

    def test_prompts_shortened_by_a_smaller_context(self, before, after):
        rewrite(after, lambda rows: [rows[0] | {"prompt_hash": "other", "num_fewshot": 2}, *rows[1:]])
        with pytest.raises(
            DataError, match=r"1 questions were asked with another prompt \(first: `law` 0, with 0 and 2"
        ):
            match(read_run(before), read_run(after))

    def test_answers_of_unknown_prompts_are_taken(self, before, after):
        """Saved completions of other tools say nothing about their prompts."""
        rewrite(after, lambda rows: [row | {"prompt_hash": ""} for row in rows])
        assert len(match(read_run(before), read_run(after)).rows) == 12

    def test_a_benchmark_on_one_side_alone(self, before, after):
        run = read_run(before)
        sides = Side({"ceval": run}), Side({"ceval": read_run(after), "mmlu": read_run(after)})
        with pytest.raises(DataError, match="mmlu was run on one side only"):
            build_report(*sides, GateSettings())


class TestFolders:
    def test_a_folder_of_several_benchmarks(self, tmp_path):
        for name in ("ceval", "mmlu"):
            write_run(tmp_path / "all" / name, make_task(benchmark=name))
        assert list(find_runs(tmp_path / "all")) == ["ceval", "mmlu"]

    def test_one_benchmark_twice_is_ambiguous(self, tmp_path):
        for name in ("first", "second"):
            write_run(tmp_path / "all" / name)
        with pytest.raises(ConfigError, match=r"several runs of one benchmark: .*first, .*second"):
            find_runs(tmp_path / "all")

    def test_the_same_comparison_goes_to_the_same_place(self, before, after):
        sides = Side({"quiz": read_run(before)}), Side({"quiz": read_run(after)})
        folder = default_comparison_folder(sides[0], [sides[1]])
        assert folder == default_comparison_folder(sides[0], [sides[1]])
        assert folder.name.startswith("quiz-table-")
        assert folder != default_comparison_folder(sides[1], [sides[0]])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"quantization": "int4-g32", "dtype": "bfloat16"}, ("FP32", "INT4-G32")),
        ({"dtype": "bfloat16"}, ("FP32", "BF16")),
        ({"adapter": "abcdef123456"}, ("base", "tuned abcdef12")),
        ({"name": "other"}, ("table", "other")),
        ({"engine": "vllm"}, ("glmtune", "vllm")),
        ({"weights_hash": "x"}, ("baseline", "candidate")),
    ],
)
def test_runs_are_named_by_what_differs(before, tmp_path, changes, names):
    other = write_run(tmp_path / "other", identity=dataclasses.replace(IDENTITY, **changes))
    pair = read_run(before), read_run(other)
    assert labels(*pair) == names
    assert {name for name, _, _ in differences(*pair)} == set(changes)


def test_a_smaller_context_is_said(before, tmp_path):
    decoding = {"do_sample": False, "max_context_tokens": 512, "max_new_tokens": 16, "stop": ["\nQ:"]}
    other = write_run(tmp_path / "other", decoding=decoding)
    assert differences(read_run(before), read_run(other)) == [("max_context_tokens", "2048", "512")]


def test_a_question_that_was_not_asked_counts_on_both_sides(tmp_path):
    def too_long(place, letter):
        return Answer("law", 0, stop_reason="too_long") if place == 0 else None

    one = write_run(tmp_path / "one", answer=too_long)
    two = write_run(tmp_path / "two", identity=INT4)
    pair = match(read_run(one), read_run(two))
    assert pair.rows[0][0].status == "unparsed"
    assert not pair.rows[0][0].outcome.is_correct
