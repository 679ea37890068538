"""SERVER_CASES, D: tools (ChatGLM3, GLM-4)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glmtune.inference.requests.chat import CallDelta, CallStart, Finished
from tests.serving.api.conftest import WITH_TOOLS, Scripts
from tests.serving.api.replies import Streamed, assert_refused, chat_of, stream_of
from tests.serving.api.running_server import RunningServer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TIME = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALLS = {
    "chatglm3": "weather\n```python\ntool_call(city='北京')\n```",
    "glm4": 'weather\n{"city": "北京"}',
}
EVIL = "__import__('os').system('touch /tmp/glmtune-owned')"


def calling(scripts: Scripts, family: str, said: str | None = None) -> RunningServer:
    """Serve a model that calls a tool: what ends such an answer is the role of the tool's result."""
    server = scripts.start(CALLS[family] if said is None else said, family)
    server.state.chat.engine.end = scripts.tokenizers[family].get_command("<|observation|>")
    return server


def deltas(streamed: Streamed) -> list[Any]:
    return [
        call
        for chunk in streamed.chunks
        for choice in chunk.choices
        for call in choice.delta.tool_calls or []
    ]


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_case_29_call_and_round_trip(family: str, scripts: Scripts) -> None:
    server = calling(scripts, family)
    whole = chat_of(server.chat("北京天气", tools=[WEATHER], n=2))
    ids = set()
    for choice in whole.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "北京"}
        ids.add(call.id)
    assert len(ids) == 2
    message = whole.choices[0].message.model_dump(exclude_unset=True)
    call_id = message["tool_calls"][0]["id"]
    history = [
        {"role": "user", "content": "北京天气"},
        message,
        {"role": "tool", "tool_call_id": call_id, "content": "晴"},
    ]
    assert server.post("/v1/chat/completions", {"messages": history, "tools": [WEATHER]}).status_code == 200
    said = {"role": "assistant", "metadata": "weather", "content": CALLS[family].partition("\n")[2]}
    expected = [history[0], said, {"role": "observation", "content": "晴"}]
    bare = [WEATHER["function"]]
    assert server.state.chat.engine.requests[-1].prompt_ids == server.state.chat.prompt_ids(
        expected, tools=bare
    )


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_case_30_call_streamed(family: str, scripts: Scripts) -> None:
    streamed = stream_of(calling(scripts, family).chat("北京天气", tools=[WEATHER], stream=True))
    first, *later = deltas(streamed)
    assert (first.index, first.type, first.function.name) == (0, "function", "weather")
    assert first.id.startswith("call_")
    assert later
    for call in later:
        assert (call.index, call.id, call.type, call.function.name) == (0, None, None, None)
    assert json.loads("".join(call.function.arguments or "" for call in [first, *later])) == {"city": "北京"}
    assert streamed.finishes() == ["tool_calls"]


def test_case_30_a_second_call(scripts: Scripts) -> None:
    said = [CallStart(0, "weather"), CallDelta(0, '{"a": 1}'), CallStart(1, "now"), CallDelta(1, "{}")]
    server = scripts.answers(*said, Finished("tool_calls", 3, 9))
    streamed = stream_of(server.chat(tools=[WEATHER], stream=True))
    starts = [call for call in deltas(streamed) if call.id]
    assert [(call.index, call.function.name) for call in starts] == [(0, "weather"), (1, "now")]
    assert len({call.id for call in starts}) == 2
    calls = chat_of(server.chat(tools=[WEATHER])).choices[0].message.tool_calls
    assert calls is not None
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", '{"a": 1}'),
        ("now", "{}"),
    ]  # type: ignore[union-attr]
    one = chat_of(server.chat(tools=[WEATHER], parallel_tool_calls=False)).choices[0]
    assert [call.function.name for call in one.message.tool_calls or []] == ["weather"]  # type: ignore[union-attr]
    assert one.finish_reason == "tool_calls"


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_case_31_plain_answer_with_tools_offered(family: str, scripts: Scripts) -> None:
    server = scripts.start("\n今天 早点 休息", family)
    streamed = stream_of(server.chat(tools=[WEATHER], stream=True))
    assert (
        streamed.text()
        == chat_of(server.chat(tools=[WEATHER])).choices[0].message.content
        == "今天 早点 休息"
    )
    assert streamed.finishes() == ["stop"]


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_case_32_cut_inside_the_arguments(family: str, scripts: Scripts) -> None:
    server = calling(scripts, family)
    num_tokens = len(scripts.tokenizers[family].text_ids(CALLS[family])) - 4
    streamed = stream_of(server.chat(tools=[WEATHER], stream=True, max_tokens=num_tokens))
    assert streamed.finishes() == ["length"]
    assert chat_of(server.chat(tools=[WEATHER], max_tokens=num_tokens)).choices[0].finish_reason == "length"


@pytest.mark.parametrize("family", WITH_TOOLS)
@pytest.mark.parametrize("wrap", ["{}", "tool_call(x={})", "```python\ntool_call(x={})\n```", '{{"x": {}}}'])
def test_case_33_arguments_are_data(family: str, wrap: str, scripts: Scripts) -> None:
    server = calling(scripts, family, f"weather\n{wrap.format(EVIL)}")
    whole = chat_of(server.chat(tools=[WEATHER])).choices[0]
    assert whole.message.content or whole.message.tool_calls
    import pathlib

    assert not pathlib.Path("/tmp/glmtune-owned").exists()


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_case_34_generation_without_tools(family: str, scripts: Scripts) -> None:
    server = scripts.start("好", family)
    for choice in ({}, {"tool_choice": "none"}, {"tool_choice": "auto"}):
        assert "no tools" in assert_refused(server.chat(tools=[WEATHER], **choice), param="tools")
    assert server.chat(tools=[]).status_code == 200
    assert server.state.chat.engine.requests[-1].prompt_ids == server.state.chat.prompt_ids(
        [{"role": "user", "content": "你好"}]
    )


def test_tool_choice(scripts: Scripts) -> None:
    server = scripts.start("好", "glm4")
    chat = server.state.chat
    question = [{"role": "user", "content": "你好"}]

    def prompt(**fields: object) -> tuple[int, ...]:
        reply = server.chat(**fields)
        assert reply.status_code == 200, reply.text
        return chat.engine.requests[-1].prompt_ids

    assert prompt(tools=[WEATHER], tool_choice="none") == chat.prompt_ids(question)
    assert prompt(tools=[WEATHER], tool_choice="auto") == chat.prompt_ids(question, tools=[WEATHER])
    named = {"type": "function", "function": {"name": "weather"}}
    forced = chat.prompt_ids(question, tools=[WEATHER], call="weather")
    assert (
        prompt(tools=[WEATHER], tool_choice=named)
        == prompt(tools=[WEATHER], tool_choice="required")
        == forced
    )
    assert_refused(server.chat(tools=[WEATHER, TIME], tool_choice="required"), param="tool_choice")
    assert_refused(
        server.chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "x"}}),
        param="tool_choice",
    )
    assert_refused(server.chat(tools=[WEATHER], tool_choice=7), param="tool_choice")
    assert_refused(server.chat(tool_choice="required"), param="tool_choice")
    for name in ("weather", ""):  # with nothing to choose from
        unoffered = {"type": "function", "function": {"name": name}}
        assert "`tools` offers none" in assert_refused(
            server.chat(tool_choice=unoffered), param="tool_choice"
        )


def test_a_forced_call(scripts: Scripts) -> None:
    server = calling(scripts, "glm4", '{"city": "北京"}')
    named = {"type": "function", "function": {"name": "weather"}}
    (call,) = chat_of(server.chat(tools=[WEATHER], tool_choice=named)).choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "北京"})


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "retrieval"}, "tools[0]"),
        ({"type": "function"}, "tools[0]"),
        ({"name": "bare"}, "tools[0]"),
        ({"type": "function", "function": {}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "two\nlines"}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "f", "strict": True}}, "tools[0].function.strict"),
    ],
)
def test_tools_of_another_form(tool: dict[str, Any], param: str, scripts: Scripts) -> None:
    assert_refused(scripts.start("好", "glm4").chat(tools=[tool]), param=param)


def test_the_official_client_calls_a_tool(scripts: Scripts) -> None:
    client = calling(scripts, "glm4").openai
    with client.chat.completions.stream(
        model="base",
        messages=[{"role": "user", "content": "北京天气"}],
        tools=[WEATHER],  # type: ignore[list-item]
    ) as stream:
        stream.until_done()
        found = stream.get_final_completion().choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.tool_calls is not None
    assert json.loads(found.message.tool_calls[0].function.arguments) == {"city": "北京"}
