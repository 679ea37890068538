"""Thoughts of models that think first: apart from the answer, as DeepSeek and vLLM name them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.api.conftest import Scripts
from tests.serving.api.replies import assert_refused, chat_of, stream_of
from tests.serving.api.test_tools import WEATHER

TEXTS = {
    "thinking": "\n2 and\n2 is 四\n</think>\nFour 四 legs.",
    "folder": "\n<think>\n2 and\n2 is 四\n</think>\n\nFour 四 legs. ",
}
PLAIN = {"thinking": "\n</think>\nHi", "folder": "\nHi"}


def reasoning(raw: list[dict[str, Any]]) -> str:
    deltas = [choice["delta"] for chunk in raw for choice in chunk["choices"]]
    return "".join(delta.get("reasoning_content", "") for delta in deltas)


@pytest.mark.parametrize("family", TEXTS)
def test_thoughts_stand_beside_the_answer(family: str, scripts: Scripts) -> None:
    server = scripts.start(TEXTS[family], family)
    message = server.chat().json()["choices"][0]["message"]
    assert message["content"] == "Four 四 legs."
    assert message["reasoning_content"] == "2 and\n2 is 四"
    streamed = stream_of(server.chat(stream=True))
    assert streamed.text() == "Four 四 legs."
    assert reasoning(streamed.raw) == "2 and\n2 is 四"
    assert streamed.finishes() == ["stop"]


@pytest.mark.parametrize("family", TEXTS)
def test_an_answer_without_thoughts(family: str, scripts: Scripts) -> None:
    server = scripts.start(PLAIN[family], family)
    message = server.chat().json()["choices"][0]["message"]
    assert message["content"] == "Hi"
    assert "reasoning_content" not in message
    assert "reasoning_content" not in server.chat(stream=True).text


@pytest.mark.parametrize("family", TEXTS)
def test_thoughts_that_are_cut_are_no_answer(family: str, scripts: Scripts) -> None:
    server = scripts.start(TEXTS[family].partition("2 is")[0], family, ends=False)
    choice = server.chat().json()["choices"][0]
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"] == "2 and"
    assert choice["finish_reason"] == "length"
    streamed = stream_of(server.chat(stream=True))
    assert (streamed.text(), reasoning(streamed.raw)) == ("", "2 and")


@pytest.mark.parametrize("family", TEXTS)
def test_every_token_has_its_log_probability(family: str, scripts: Scripts) -> None:
    server = scripts.start(TEXTS[family], family)
    told = chat_of(server.chat(logprobs=True)).choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert "".join(each.token for each in told.content if each.bytes).count("Four") == 1
    streamed = stream_of(server.chat(logprobs=True, stream=True))
    found = [
        entry
        for chunk in streamed.raw
        for choice in chunk["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert [each["token"] for each in found] == [each.token for each in told.content]


@pytest.mark.parametrize("family", TEXTS)
def test_calls_behind_thoughts(family: str, scripts: Scripts) -> None:
    thoughts = TEXTS[family].partition("Four")[0]
    server = scripts.start(thoughts + 'weather\n{"city": "北京"}', family)
    server.state.chat.engine.end = scripts.tokenizers[family].get_command("<|observation|>")
    choice = server.chat("北京天气", tools=[WEATHER]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "2 and\n2 is 四"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "北京"}
    # Without tools nothing is a call.
    assert server.chat("北京天气").json()["choices"][0]["message"]["content"].startswith("weather\n{")
    prompt = scripts.tokenizers[family].decode(server.state.chat.engine.requests[0].prompt_ids)
    assert prompt.count("<|system|>") == 1
    assert "weather" in prompt.partition("<|user|>")[0]
    back = {
        "role": "assistant",
        **{k: choice["message"][k] for k in ("content", "reasoning_content", "tool_calls")},
    }
    messages = [
        {"role": "user", "content": "北京天气"},
        back,
        {"role": "tool", "tool_call_id": call["id"], "content": "晴"},
    ]
    reply = server.post("/v1/chat/completions", {"messages": messages, "tools": [WEATHER]})
    assert reply.status_code == 200, reply.text
    again = scripts.tokenizers[family].decode(server.state.chat.engine.requests[-1].prompt_ids)
    assert '<|assistant|>weather\n{"city": "北京"}<|observation|>\n晴<|assistant|>' in again
    assert "2 and" not in again


def test_a_tool_that_has_to_be_called_closes_the_thoughts(scripts: Scripts) -> None:
    server = scripts.start('{"city": "北京"}', "thinking")
    choice = server.chat("北京天气", tools=[WEATHER], tool_choice="required").json()["choices"][0]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "北京"}
    prompt = scripts.tokenizers["thinking"].decode(server.state.chat.engine.requests[0].prompt_ids)
    assert prompt.endswith("<|assistant|>\n<think>\n</think>\nweather\n")


@pytest.mark.parametrize(("family", "is_shown"), [("thinking", False), ("folder", True)])
def test_thoughts_of_earlier_answers_are_the_templates_matter(
    family: str, is_shown: bool, scripts: Scripts
) -> None:
    server = scripts.start("Hi", family)
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2", "reasoning_content": "two and two"},
        {"role": "user", "content": "3"},
    ]
    reply = server.post("/v1/chat/completions", {"messages": messages})
    assert reply.status_code == 200, reply.text
    prompt = scripts.tokenizers[family].decode(server.state.chat.engine.requests[-1].prompt_ids)
    assert ("two and two" in prompt) == is_shown
    messages[1]["reasoning_content"] = 3
    refused = server.post("/v1/chat/completions", {"messages": messages})
    assert "messages[1].reasoning_content" in assert_refused(refused)


def test_an_answer_that_is_gone_on_with_has_no_thoughts(scripts: Scripts) -> None:
    server = scripts.start(" legs.", "thinking")
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "Four"}]
    reply = server.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True})
    message = reply.json()["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content")) == (" legs.", None)
    prompt = scripts.tokenizers["thinking"].decode(server.state.chat.engine.requests[-1].prompt_ids)
    assert prompt.endswith("<think>\n</think>\nFour")


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3", "glm4"])
def test_a_release_writes_tags_as_text(family: str, scripts: Scripts) -> None:
    server = scripts.start("<think>a</think>b", family)
    message = server.chat().json()["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert "</think>" in message["content"]
