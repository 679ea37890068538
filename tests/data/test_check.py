"""The check counts what a careful user would count by hand."""

from __future__ import annotations

import json

import pytest

from glmtune.data.check import check_data
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError

FRAME = len("[Round 1]\n\n问：\n\n答：") + 2


def file(write, name: str, pairs: list[tuple[str, str]]) -> str:
    return write(name, "\n".join(json.dumps({"content": q, "summary": a}) for q, a in pairs))


def test_counts(chatglm2, write) -> None:
    train = [("q1", "a"), ("q1", "a"), ("q1", "b"), ("q2", "a"), ("q3", ""), ("x" * 50, "y" * 30)]
    settings = DataSettings(
        train_file=file(write, "train.jsonl", train),
        validation_file=file(write, "dev.jsonl", [("q1", "a"), ("q2", "other"), ("q9", "a")]),
        test_file=file(write, "dev.jsonl", [("q1", "a"), ("q2", "other"), ("q9", "a")]),
        max_source_length=FRAME + 10,
        max_target_length=20,
    )
    report = check_data(settings, chatglm2)
    train_report, dev_report = report.splits
    assert (train_report.num_rows, train_report.num_bad_rows, train_report.num_empty_answers) == (5, 1, 1)
    assert train_report.bad_rows[0].line == 5
    assert (train_report.num_duplicates, train_report.num_duplicate_prompts) == (1, 2)
    assert (train_report.prompt_tokens.median, train_report.prompt_tokens.max) == (FRAME + 2, FRAME + 50)
    assert (train_report.answer_tokens.median, train_report.answer_tokens.max) == (2, 31)
    assert train_report.answer_tokens.mean == pytest.approx((4 * 2 + 31) / 5)
    assert sum(count for _, _, count in train_report.histogram) == 5
    assert train_report.histogram[0][0] <= FRAME + 4
    assert train_report.histogram[-1][1] >= FRAME + 81
    counts = train_report.truncation
    assert (counts.rows_with_cut_question, counts.cut_question_tokens) == (1, 40)
    assert (counts.rows_with_cut_answer, counts.cut_answer_tokens) == (1, 10)
    kept = 4 * (FRAME + 4) + FRAME + 10 + 21
    assert train_report.num_tokens == kept
    assert train_report.loss_frac == pytest.approx((4 * 2 + 21) / kept)
    (overlap,) = report.overlaps
    assert (overlap.split, overlap.num_rows, overlap.num_same_prompt, overlap.num_same_row) == (
        "validation",
        3,
        2,
        1,
    )
    assert report.same_file == (("test", "validation"),)
    assert dev_report.num_bad_rows == 0
    assert report.num_bad_rows == 1
    assert (report.wanted_source_length, report.wanted_target_length) == (72, 32)


def test_sample_marks_what_is_learnt(chatglm3, write) -> None:
    row = {"prompt": "r", "response": "b", "history": [["q", "a"]]}
    settings = DataSettings(train_file=write("chat.json", json.dumps([row])), loss_on="all_turns")
    report = check_data(settings, chatglm3)
    assert [(part.text, part.has_loss) for part in report.sample] == [
        ("[gMASK]sop<|user|>\nq<|assistant|>", False),
        ("\na<|user|>", True),
        ("\nr<|assistant|>", False),
        ("\nb</s>", True),
    ]
    assert (report.template, report.sample_line, report.splits[0].num_multi_turn) == ("chatglm3", 1, 1)


@pytest.mark.parametrize(("answer", "wanted"), [(14, 16), (15, 24)])
def test_start_and_end_count_as_answer_of_chatglm(chatglm, write, answer: int, wanted: int) -> None:
    """With `sop` and `eop` 14 characters are 16 of `max_target_length`, with gMASK 7 are 8 of the source."""
    rows = file(write, "train.jsonl", [("q" * 7, "a" * answer)])
    report = check_data(DataSettings(train_file=rows, max_source_length=8, max_target_length=16), chatglm)
    assert (report.wanted_source_length, report.wanted_target_length) == (8, wanted)
    assert report.splits[0].truncation.cut_answer_tokens == max(0, answer - 14)
    assert report.splits[0].truncation.cut_question_tokens == 0
    assert [(part.text, part.has_loss) for part in report.sample] == [
        ("q" * 7 + "[gMASK]", False),
        ("sop" + "a" * 14 + "</s>", True),
    ]


def test_nothing_to_check(chatglm2) -> None:
    with pytest.raises(ConfigError, match=r"`data.train_file` is not set.*data=ads"):
        check_data(DataSettings(), chatglm2)
