"""General prompts are read from files in every layout of ``data=``."""

from __future__ import annotations

import json

import pytest

from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.retention.prompts import Prompt, load_prompts


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_of_a_shipped_set_name_category_and_language(tmp_path):
    rows = (
        {"prompt": "你是谁？", "category": "chat", "language": "zh"},
        {
            "prompt": "And in spring?",
            "history": [["Is it cold?", "Yes."]],
            "category": "facts",
            "language": "en",
        },
    )
    first, second = load_prompts(write_rows(tmp_path / "prompts.jsonl", *rows), shipped="retain")
    assert first == Prompt((Message("user", "你是谁？"),), "chat", "zh")
    assert [message.content for message in second.messages] == ["Is it cold?", "Yes.", "And in spring?"]
    assert (second.category, second.language) == ("facts", "en")


def test_answers_of_a_file_count_for_nothing(tmp_path):
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    for name, row in (("a", {"prompt": "user", "response": "x"}), ("b", {"messages": messages})):
        (prompt,) = load_prompts(write_rows(tmp_path / f"{name}.jsonl", row), shipped="retain")
        assert prompt.messages[-1] == Message("user", "user"), name


def test_a_limit_takes_prompts_from_the_whole_file(tmp_path):
    rows = [{"prompt": f"question {number}"} for number in range(10)]
    found = load_prompts(write_rows(tmp_path / "prompts.jsonl", *rows), shipped="retention", limit=4)
    assert [prompt.messages[0].content[-1] for prompt in found] == ["0", "2", "5", "7"]


def test_a_missing_file_is_named_with_its_setting(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", {"prompt": "here"})
    with pytest.raises(
        DataError, match=r"promts\.jsonl: there is no such file \(`retain\.prompts`\)\..*prompts\.jsonl"
    ):
        load_prompts(str(tmp_path / "promts.jsonl"), shipped="retain")


def test_all_bad_rows_are_named_with_a_way_out(tmp_path):
    file = write_rows(
        tmp_path / "p.jsonl", {"prompt": "good"}, {"prompt": ""}, {"prompt": "good"}, {"prompt": ["x"]}
    )
    with pytest.raises(
        DataError, match=r"2 of 4 rows[\s\S]*line 2: `prompt`[\s\S]*line 4[\s\S]*`retention\.prompts`"
    ) as error:
        load_prompts(file, shipped="retention")
    assert "on_bad_row" not in str(error.value)


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"empty|holds no row"):
        load_prompts(write_rows(tmp_path / "p.jsonl"), shipped="retain")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty|holds no row"):
        load_prompts(str(tmp_path / "list.json"), shipped="retain")


def test_an_unknown_shipped_file_lists_those_that_exist():
    with pytest.raises(DataError, match=r"no shipped data file.*ads/train\.jsonl"):
        load_prompts("shipped:retain/absent.jsonl", shipped="retain")
