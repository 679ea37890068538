"""Numbers as text, questions alone, and what spreadsheets leave in tables."""

from __future__ import annotations

import decimal
import json
import logging

import pytest

from glmtune.data.dataset import load_conversations
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError


def load(path: str, split: str = "train", *, need_answers: bool = True, **settings):
    return load_conversations(
        DataSettings(**{f"{split}_file": path, **settings}), split, need_answers=need_answers
    )


def texts(loaded) -> list[list[str]]:
    return [[message.content for message in item.messages] for item in loaded.conversations]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("18", "18"),
        ("-0.50", "-0.50"),
        ("1e-5", "1e-5"),
        ("true", "true"),
        ("false", "false"),
        ("9" * 400, "9" * 400),
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "q", "response": %s}',
        '{"instruction": "q", "input": "", "output": %s}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": %s}]}',
        '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": %s}]}',
    ],
)
def test_numbers_are_read_as_their_text(write, row: str, number: str, text: str) -> None:
    assert texts(load(write("a.jsonl", row % number))) == [["q", text]]


def test_numbers_in_questions_and_history(write, caplog) -> None:
    path = write("a.jsonl", '{"prompt": 3, "response": 4, "history": [[1, 2.0]]}\n' * 3)
    with caplog.at_level(logging.WARNING):
        assert texts(load(path)) == [["1", "2.0", "3", "4"]] * 3
        load(path)
    assert caplog.text.count("read as their text: `prompt` in 3 rows, `response` in 3 rows") == 1


def test_numbers_of_parquet(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for column, expected in (
        (pa.array([18, -1], pa.int16()), ["18", "-1"]),
        (pa.array([0.1, 2.5], pa.float32()), ["0.1", "2.5"]),
        (pa.array([0.1, 1e-7]), ["0.1", "1e-07"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")]), ["1.50", "2.00"]),
    ):
        pq.write_table(pa.table({"prompt": ["a", "b"], "response": column}), tmp_path / "a.parquet")
        assert [row[1] for row in texts(load(str(tmp_path / "a.parquet")))] == expected
    pq.write_table(pa.table({"prompt": ["a"], "response": [float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="must be a string, but it is a number"):
        load(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "null", '{"a": 1}', "[1]"])
def test_what_is_no_text_is_still_refused(write, value: str) -> None:
    with pytest.raises(DataError, match="must be a string"):
        load(write("a.jsonl", f'{{"prompt": "q", "response": {value}}}'))


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "q"}, {}),
        ({"question": "q", "id": "7"}, {}),
        ({"content": "q"}, {}),
        ({"instruction": "q", "input": ""}, {}),
        ({"instruction": "q"}, {}),
        ({"问题": "q"}, {}),
        ({"问题": "q", "id": "7"}, {"prompt_column": "问题"}),
        ({"问题": "q", "id": "7"}, {"prompt_column": "问题", "response_column": "答案"}),
        ({"prompt": "q", "response": None}, {}),
        ({"prompt": "q", "response": ""}, {}),
        ({"messages": [{"role": "user", "content": "q"}]}, {}),
        ({"conversations": [{"from": "human", "value": "q"}]}, {}),
        ({"query": "q"}, {"layout": "auto"}),
        ({"content": "q"}, {"layout": "adgen"}),
    ],
)
def test_questions_alone_can_be_answered_but_not_learnt(write, row: dict, settings: dict) -> None:
    path = write("q.jsonl", json.dumps(row, ensure_ascii=False))
    loaded = load(path, "test", need_answers=False, **settings)
    assert texts(loaded) == [["q"]]
    assert loaded.conversations[0].answer is None
    with pytest.raises((DataError, ConfigError)):
        load(path, **settings)


def test_a_named_answer_column_that_is_absent_is_said(write, caplog) -> None:
    path = write("q.csv", "问题,x\nq,y\n")
    with caplog.at_level(logging.WARNING):
        load(path, "test", need_answers=False, prompt_column="问题", response_column="答")
    assert "column `答` does not occur" in caplog.text


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "", "input": "i", "output": "a"}, "i"),
        ({"instruction": None, "input": "i", "output": "a"}, "i"),
        ({"input": "i", "output": "a"}, "i"),
        ({"instruction": "x", "input": "i", "output": "a"}, "x\ni"),
    ],
)
def test_an_input_alone_is_a_question(write, row: dict, question: str) -> None:
    assert texts(load(write("a.jsonl", json.dumps(row)))) == [[question, "a"]]


def test_neither_instruction_nor_input(write) -> None:
    path = write("a.jsonl", '{"instruction": "", "input": "", "output": "a"}')
    with pytest.raises(DataError, match=r"`instruction`.*is empty"):
        load(path)


@pytest.mark.parametrize(
    "table",
    [
        "prompt,response,,\nq,a,,\nr,b,,\n",
        "prompt,response\nq,a,,\nr,b\n",
        "prompt,response,\nq,a,\n,,\nr,b,\n,,\n\n",
        "prompt,,response,\nq,,a,\nr,,b,\n",
    ],
)
def test_empty_columns_and_rows_of_spreadsheets(write, table: str) -> None:
    loaded = load(write("a.csv", table))
    assert (texts(loaded), loaded.unused_columns) == ([["q", "a"], ["r", "b"]], ())


def test_cells_without_a_name_are_told_or_refused(write) -> None:
    assert load(write("a.csv", "prompt,response,\nq,a,note\n")).unused_columns == ("",)
    with pytest.raises(DataError, match="3 cells, but the header has 2"):
        load(write("b.csv", "prompt,response\nq,a,note\n"))


def test_long_cells(write) -> None:
    assert len(texts(load(write("a.csv", f"prompt,response\nq,{'x' * 200_000}\n")))[0][1]) == 200_000
