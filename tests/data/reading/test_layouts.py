"""Layouts are told by their columns, and bad rows say which field is wrong and what to do."""

from __future__ import annotations

import json

import pytest

from glmtune.data.dataset import load_conversations
from glmtune.data.reading.layouts import convert, detect_layout
from glmtune.data.records import RawRow, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message

Q, A = Message("user", "q"), Message("assistant", "a")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(row: dict, *, need_answer: bool = True, **settings: object) -> tuple[str, tuple[Message, ...]]:
    layout = detect_layout([RawRow(row, 1)], DataSettings(**settings), "rows.jsonl")
    return layout.name, convert(layout, row, need_answer=need_answer)


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"content": "q", "summary": "a"}, "adgen", (Q, A)),
        ({"prompt": "q", "response": "a"}, "columns", (Q, A)),
        ({"question": "q", "answer": "a", "id": 3}, "columns", (Q, A)),
        (
            {"prompt": "q", "response": "a", "history": [["p", "b"]]},
            "columns",
            (Message("user", "p"), Message("assistant", "b"), Q, A),
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", (Q, A)),
        (
            {"instruction": "do", "input": "this", "output": "a", "system": "be kind", "history": []},
            "alpaca",
            (Message("system", "be kind"), Message("user", "do\nthis"), A),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            (Q, A),
        ),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "sharegpt",
            (Q, A),
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
            },
            "sharegpt",
            (Message("system", "s"), Q, A),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "北京"}'}}],
                    },
                    {"role": "tool", "content": "22 度"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "openai",
            (
                Message("system", "s"),
                Q,
                Message("assistant", '{"city": "北京"}', "weather", is_call=True),
                Message("observation", "22 度"),
                A,
            ),
        ),
        *(
            (
                {"messages": [USER, {**ANSWER, key: " 2 and 2\n"}]},
                "openai",
                (
                    Message("user", USER["content"]),
                    Message("assistant", f"<think>\n2 and 2\n</think>\n{ANSWER['content']}"),
                ),
            )
            for key in ("reasoning_content", "reasoning", "thinking")
        ),
        (
            {"messages": [USER, {**ANSWER, "reasoning_content": None}]},
            "openai",
            (Message("user", USER["content"]), Message("assistant", ANSWER["content"])),
        ),
        (
            {
                "messages": json.dumps(
                    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
                )
            },
            "openai",
            (Q, A),
        ),
    ],
)
def test_layouts_are_detected(row: dict, name: str, messages: tuple[Message, ...]) -> None:
    assert read(row) == (name, messages)


def test_any_columns_by_name_and_history_as_json() -> None:
    row = {"ask": "q", "say": "a", "before": '[["p", "b"]]', "content": "x", "summary": "y"}
    name, messages = read(row, prompt_column="ask", response_column="say", history_column="before")
    assert name == "columns"
    assert messages == (Message("user", "p"), Message("assistant", "b"), Q, A)
    assert read({**row, "before": ""}, prompt_column="ask", response_column="say", history_column="before")[
        1
    ] == (Q, A)


def test_layout_can_be_forced() -> None:
    row = {"content": "c", "summary": "s", "instruction": "q", "output": "a"}
    assert read(row)[0] == "adgen"
    assert read(row, layout="alpaca") == ("alpaca", (Q, A))


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"text": "x", "label": 1}, {}, ["columns: text, label", "data.prompt_column"]),
        (
            {"content": "q", "summary": "a"},
            {"prompt_column": "contnet", "response_column": "summary"},
            ["`contnet` does not occur", "content, summary", "data.prompt_column"],
        ),
        (
            {"content": "q", "summary": "a"},
            {"layout": "alpaca"},
            ["`instruction` does not occur", "data.layout"],
        ),
        (
            {"q": "q", "a": "a"},
            {"prompt_column": "q", "response_column": "a", "history_column": "h"},
            ["`h` does not occur", "q, a"],
        ),
    ],
)
def test_unknown_layouts_are_refused(row: dict, settings: dict, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read(row, **settings)
    assert all(word in str(caught.value) for word in ["rows.jsonl, line 1", *words]), str(caught.value)


def chat(*items: object) -> dict:
    return {"messages": list(items)}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"content": "q", "summary": ""}, ["`summary` (the answer) is empty", "delete the row"]),
        ({"content": "q", "summary": " \n"}, ["`summary` (the answer) is empty"]),
        ({"content": "", "summary": "a"}, ["`content` (the question) is empty"]),
        (
            {"content": "q", "summary": ["a", "b"]},
            ["`summary` (the answer) must be a string", "a list (['a', 'b'])"],
        ),
        ({"content": "q", "summary": float("nan")}, ["must be a string", "a number (nan)"]),
        ({"content": "q", "summary": None}, ["must be a string", "null"]),
        ({"content": "q", "summary": {"text": "a"}}, ["must be a string", "an object"]),
        (
            {"prompt": "q", "response": "a", "history": "p b"},
            ["`history`", "no JSON", "'p b'", "[question, answer]"],
        ),
        ({"prompt": "q", "response": "a", "history": {"p": "b"}}, ["`history` must be a list", "an object"]),
        (
            {"prompt": "q", "response": "a", "history": [["p"]]},
            ["its item 1 is a list (['p'])", "two strings"],
        ),
        (
            {"instruction": "q", "output": "a", "input": ["x"]},
            ["`input`", "must be a string", "a list (['x'])"],
        ),
        (chat(), ["`messages` must be a non-empty list", "a list ([])"]),
        ({"messages": "hello"}, ["`messages` is a string, but no JSON", "'hello'"]),
        (chat("hi"), ["`messages[0]` must be an object", "'hi'"]),
        (chat({"text": "hi"}), ["`messages[0]` names no role", "it has text"]),
        (chat({"role": "boss", "content": "q"}), ["`messages[0].role` is `boss`", "user", "assistant"]),
        (chat({"role": "user"}), ["`messages[0].content` must be a string", "is missing"]),
        (chat({"role": "user", "content": {}}), ["`messages[0].content` must be a string", "an object"]),
        (chat({"role": "user", "content": [{"type": "image_url"}]}), ["must be a text part", "image_url"]),
        (chat({**USER, "metadata": 3}), ["`messages[0].metadata` must be a string", "3"]),
        (chat(USER, {"role": "assistant", "tool_calls": [{}]}), ["tool_calls[0].name` is missing"]),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}),
            ["function.arguments` is 'x', but must be a JSON object"],
        ),
        (
            chat(USER, USER, ANSWER),
            ["message 2 comes from `user`", "after a message from `user` assistant must follow"],
        ),
        (
            chat(ANSWER, USER, ANSWER),
            ["message 1 comes from `assistant`", "at the start system or user must follow"],
        ),
        (chat(USER, ANSWER, ANSWER), ["message 3 comes from `assistant`"]),
        (chat(USER, {"role": "system", "content": "s"}), ["message 2 comes from `system`"]),
        (chat(USER, ANSWER, USER), ["last message comes from `user`", "nothing answers it"]),
        (chat({**USER, "reasoning": "x"}, ANSWER), ["has thoughts (`reasoning`)", "only `assistant`"]),
        (chat(USER, {**ANSWER, "thinking": ["x"]}), ["thinking` must be a string"]),
        (chat(USER, {**ANSWER, "thinking": "x", "reasoning": "y"}), ["other thoughts", "Keep one"]),
        (
            chat(USER, {"role": "assistant", "content": "<think>a</think>b", "reasoning": "y"}),
            ["`reasoning` and in its text", "Keep one"],
        ),
        (chat(USER, {"role": "assistant", "content": " "}), ["message 2 (from `assistant`) is empty"]),
    ],
)
def test_bad_rows_name_field_and_remedy(row: dict, words: list[str]) -> None:
    with pytest.raises(RowProblem) as caught:
        read(row)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_questions_without_answer_serve_prediction() -> None:
    assert read({"content": "q", "summary": ""}, need_answer=False)[1] == (Q,)
    assert read({"instruction": "q", "output": ""}, need_answer=False)[1] == (Q,)
    assert read(chat(USER), need_answer=False)[1] == (Q,)
    with pytest.raises(RowProblem, match="no question"):
        read(chat({"role": "system", "content": "s"}), need_answer=False)


def test_an_answer_alone_is_plain_text() -> None:
    assert read(chat(ANSWER)) == ("openai", (A,))
    with pytest.raises(RowProblem, match="message 1 comes from `assistant`"):
        read(chat(ANSWER), need_answer=False)


def rows_file(write, answers: list[object]) -> str:
    rows = [{"content": f"q{number}", "summary": answer} for number, answer in enumerate(answers)]
    return write("rows.json", json.dumps(rows, indent=1))


def test_all_bad_rows_are_reported_together(write) -> None:
    path = rows_file(write, ["a", "", *[["x"]] * 12, "b"])
    with pytest.raises(DataError) as caught:
        load_conversations(DataSettings(train_file=path), "train")
    text = str(caught.value)
    assert "13 of 15 rows cannot be used" in text
    assert "line 6: `summary` (the answer) is empty" in text
    assert text.count("\n  line ") == 10
    assert "and 3 more" in text
    assert "data.on_bad_row=skip" in text


def test_one_bad_row_is_named_by_file_and_line(write) -> None:
    path = rows_file(write, ["a", ""])
    with pytest.raises(DataError) as caught:
        load_conversations(DataSettings(train_file=path), "train")
    assert str(caught.value).startswith(f"{path}, line 6: `summary` (the answer) is empty.")
    assert (str(caught.value.path), caught.value.line) == (path, 6)


def test_bad_rows_can_be_skipped_and_are_counted(write, caplog) -> None:
    path = rows_file(write, ["a", "", ["x"], "b"])
    loaded = load_conversations(DataSettings(train_file=path, on_bad_row="skip"), "train")
    assert [item.messages[0].content for item in loaded.conversations] == ["q0", "q3"]
    assert [row.line for row in loaded.bad] == [6, 10]
    assert [row.empty_answer for row in loaded.bad] == [True, False]
    assert "2 of 4 rows left out" in caplog.text


def test_skipping_everything_is_an_error(write) -> None:
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        load_conversations(DataSettings(train_file=rows_file(write, ["", ""]), on_bad_row="skip"), "train")
    with pytest.raises(DataError, match="breaks off"):
        load_conversations(DataSettings(train_file=write("bad.jsonl", '{"a": ')), "train")


def test_only_the_first_rows_count(write) -> None:
    path = rows_file(write, ["a", "b", ""])
    loaded = load_conversations(DataSettings(train_file=path, max_train_samples=2), "train")
    assert len(loaded.conversations) == 2


def test_fingerprint_depends_on_texts_only(write) -> None:
    one = load_conversations(DataSettings(train_file=rows_file(write, ["a", "b"])), "train")
    two = load_conversations(
        DataSettings(train_file=write("b.csv", "question,answer,id\nq0,a,7\nq1,b,8\n")), "train"
    )
    three = load_conversations(
        DataSettings(train_file=write("c.csv", "question,answer\nq1,b\nq0,a\n")), "train"
    )
    assert one.fingerprint == two.fingerprint != three.fingerprint
    assert two.unused_columns == ("id",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": "alpca"}, ["`data.layout` is `alpca`", "Did you mean `alpaca`"]),
        ({"loss_on": "all"}, ["`data.loss_on` is `all`", "all_turns"]),
        ({"on_bad_row": "stop"}, ["`data.on_bad_row` is `stop`", "skip"]),
        ({"max_source_length": 0}, ["`data.max_source_length` is 0", "at least 1"]),
        ({"max_train_samples": -1}, ["`data.max_train_samples` is -1", "at least 1"]),
        ({"layout": "adgen", "prompt_column": "x"}, ["`data.prompt_column` cannot be obeyed", "`adgen`"]),
        ({"response_column": "x"}, ["`data.prompt_column` is not set", "`columns`"]),
        ({"validation_frac": 1.0}, ["`data.validation_frac` is 1.0", "below 1"]),
        ({"validation_frac": 0.1, "validation_file": "x"}, ["`data.validation_frac` is 0.1", "one of them"]),
        ({"layout": "columns"}, ["`data.prompt_column` is not set"]),
        (
            {"packing": True, "packing_length": 192, "max_source_length": 64, "max_target_length": 128},
            ["`data.packing_length` is 192", "64", "128", "193"],
        ),
    ],
)
def test_settings_are_checked(settings: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        DataSettings(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_setting_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)data\.layout.*data\.max_target_length"):
        DataSettings(layout="x", max_target_length=0)
