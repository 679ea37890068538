"""The state of a conversation: what is added, changed, kept and read back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from glmtune.errors import ConfigError, DataError, GlmtuneError
from glmtune.inference.requests.chat import CallDelta, CallStart, Finished, TextDelta
from glmtune.interactive.conversation import AnswerParts, Conversation


def parts(*events: object) -> AnswerParts:
    answer = AnswerParts()
    for event in events:
        answer.add(event)  # pyright: ignore[reportArgumentType]
    return answer


def said(text: str) -> AnswerParts:
    return parts(TextDelta(text[:1]), TextDelta(text[1:]), Finished("stop", 1, 1))


def called(name: str, *arguments: str, reason: str = "tool_calls") -> AnswerParts:
    return parts(
        CallStart(0, name),
        *(CallDelta(0, text) for text in arguments),
        Finished(reason, 1, 1),  # pyright: ignore[reportArgumentType]
    )


def talked() -> Conversation:
    conversation = Conversation("简短回答")
    for question, answer in (("你好", "您好"), ("再见", "再会")):
        conversation.ask(question)
        assert conversation.is_waiting
        assert conversation.add_answer(said(answer))
    return conversation


def texts(conversation: Conversation) -> list[str]:
    return [turn["content"] for turn in conversation.messages]


def test_messages_are_those_of_openai_and_a_copy() -> None:
    conversation = talked()
    messages = conversation.messages
    assert messages[:3] == [
        {"role": "system", "content": "简短回答"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "您好"},
    ]
    messages[1]["content"] = "changed"
    assert texts(conversation)[1] == "你好"
    assert not conversation.is_waiting


def test_an_answer_that_was_stopped_keeps_what_came() -> None:
    conversation = Conversation()
    conversation.ask("数到一百")
    assert conversation.add_answer(parts(TextDelta("一，二"), Finished("cancelled", 3, 4)))
    assert texts(conversation) == ["数到一百", "一，二"]


def test_a_question_that_got_nothing_is_taken_back() -> None:
    conversation = talked()
    conversation.ask("数到一百")
    assert not conversation.add_answer(parts())
    assert texts(conversation)[-1] == "再会"


def test_a_model_that_says_nothing_has_answered() -> None:
    conversation = Conversation()
    conversation.ask("嗯")
    assert conversation.add_answer(parts(Finished("stop", 3, 1)))
    assert conversation.turns[-1] == {"role": "assistant", "content": ""}


def test_calls_wait_for_their_results_in_order() -> None:
    conversation = Conversation()
    conversation.ask("京沪天气")
    answer = parts(
        TextDelta("我查一下"),
        CallStart(0, "weather"),
        CallDelta(0, '{"city": '),
        CallDelta(0, '"北京"}'),
        CallStart(1, "weather"),
        Finished("tool_calls", 5, 9),
    )
    assert conversation.add_answer(answer)
    first, second = conversation.open_calls
    assert (first.name, first.arguments, second.arguments) == ("weather", '{"city": "北京"}', "{}")
    assert not conversation.is_waiting
    conversation.add_tool_result("晴")
    assert [call.id for call in conversation.open_calls] == [second.id]
    conversation.add_tool_result("雨")
    assert conversation.is_waiting
    assert [turn.get("tool_call_id") for turn in conversation.turns[2:]] == [first.id, second.id]
    with pytest.raises(GlmtuneError, match="No tool was called"):
        conversation.add_tool_result("雪")


def test_the_next_question_leaves_calls_without_a_result_out() -> None:
    conversation = Conversation()
    conversation.ask("天气")
    conversation.add_answer(called("weather"))
    conversation.ask("算了")
    assert texts(conversation) == ["天气", "算了"]
    conversation.add_answer(
        parts(CallStart(0, "a"), CallStart(1, "b"), TextDelta("查"), Finished("tool_calls", 1, 1))
    )
    conversation.add_tool_result("1")
    conversation.ask("够了")
    assert [call["function"]["name"] for call in conversation.turns[2]["tool_calls"]] == ["a"]
    assert conversation.turns[2]["content"] == "查"
    assert [turn["role"] for turn in conversation.turns[2:]] == ["assistant", "tool", "user"]


@pytest.mark.parametrize("arguments", ['{"city": "北', "[1]", '{"a": NaN}', "not json"])
def test_a_call_that_was_cut_is_left_out(arguments: str) -> None:
    conversation = Conversation()
    conversation.ask("天气")
    assert not conversation.add_answer(called("weather", arguments, reason="length"))
    assert conversation.turns == []


def test_ids_of_calls_are_taken_once_each() -> None:
    call = {"id": "call_2", "function": {"name": "a", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_2", "content": "1"},
    ]
    conversation = Conversation.from_json(json.dumps(turns))
    conversation.add_answer(parts(CallStart(0, "a"), CallStart(1, "b"), Finished("tool_calls", 1, 1)))
    assert [call.id for call in conversation.open_calls] == ["call_1", "call_3"]


def test_edit_regenerate_undo_clear() -> None:
    conversation = talked()
    conversation.regenerate()
    assert conversation.is_waiting
    assert texts(conversation)[-1] == "再见"
    conversation.edit(0, "早")
    assert texts(conversation) == ["简短回答", "早"]
    conversation = talked()
    conversation.regenerate(1)
    assert texts(conversation) == ["简短回答", "你好"]
    conversation = talked()
    assert conversation.undo() == "再见"
    assert conversation.undo() == "你好"
    with pytest.raises(GlmtuneError, match="no question"):
        conversation.undo()
    with pytest.raises(GlmtuneError, match="no answer"):
        conversation.regenerate()
    conversation = talked()
    with pytest.raises(GlmtuneError, match="Message 2 is no question"):
        conversation.edit(1, "x")
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "简短回答"}]


def test_an_answer_to_a_result_is_written_anew_without_a_second_call() -> None:
    conversation = Conversation()
    conversation.ask("天气")
    conversation.add_answer(called("weather"))
    conversation.add_tool_result("晴")
    conversation.add_answer(said("是晴天"))
    conversation.regenerate()
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant", "tool"]
    assert conversation.is_waiting


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    conversation = talked()
    conversation.ask("天气\x1b[31m")
    conversation.add_answer(called("weather", '{"city": "北京"}'))
    conversation.add_tool_result("晴")
    file = conversation.save(tmp_path / "talk.json")
    loaded = Conversation.load(file)
    assert loaded.messages == conversation.messages
    assert loaded.system == "简短回答"
    assert copy.deepcopy(loaded).messages == loaded.messages
    with pytest.raises(ConfigError, match="cannot be written"):
        conversation.save(tmp_path / "missing" / "talk.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ("{}", "list of messages"),
        ("[1]", "Message 1 is a int"),
        ('[{"role": "god", "content": ""}]', "'god'.*system, user, assistant, tool"),
        ('[{"role": "user"}]', "`content` is a NoneType"),
        ('[{"role": "user", "content": "", "tool_calls": [1]}]', "in a message of the assistant"),
        ('[{"role": "assistant", "tool_calls": [1]}]', "call 1 must be an object"),
        ('[{"role": "assistant", "tool_calls": [{"function": {}}]}]', "needs a `name`"),
        (
            '[{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "1"}}]}]',
            "'1', but it must be a JSON object",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(text, "utf-8")
    with pytest.raises(DataError, match=message) as caught:
        Conversation.load(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"`nowhere\.json` cannot be read"):
        Conversation.load("nowhere.json")
