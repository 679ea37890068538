"""SERVER_CASES, A: streams."""

from __future__ import annotations

import json

import openai
import pytest

from glmtune.inference.requests.chat import CallDelta, CallStart, Finished, TextDelta
from tests.serving.api.conftest import GENERATIONS, Scripts
from tests.serving.api.replies import assert_refused, chat_of, completion_of, stream_of
from tests.serving.api.running_server import RunningServer, events


@pytest.mark.parametrize("family", GENERATIONS)
def test_case_01_stop_text_over_several_tokens(family: str, scripts: Scripts) -> None:
    server = scripts.start("今天想去哪里？少喝咖啡，早点休息。", family)
    whole = chat_of(server.chat(stop=["喝咖啡", "里？少"]))
    assert whole.choices[0].message.content == "今天想去哪"
    assert whole.choices[0].finish_reason == "stop"
    streamed = stream_of(server.chat(stop=["喝咖啡", "里？少"], stream=True))
    assert streamed.text() == "今天想去哪"
    assert streamed.finishes() == ["stop"]
    text = completion_of(server.completion("好", stop="喝咖啡"))
    assert text.choices[0].text.strip() == "今天想去哪里？少"
    chunks = [json.loads(each) for each in events(server.completion("好", stop="喝咖啡", stream=True))[:-1]]
    assert "".join(each["choices"][0]["text"] for each in chunks).strip() == "今天想去哪里？少"


@pytest.mark.parametrize("family", GENERATIONS)
def test_case_03_characters_of_several_tokens(family: str, scripts: Scripts) -> None:
    server = scripts.start("好😀龘好", family)
    assert len(scripts.tokenizers[family].text_ids("😀")) > 1
    streamed = stream_of(server.chat(stream=True))
    assert streamed.text() == "好😀龘好" == chat_of(server.chat()).choices[0].message.content
    assert "\ufffd" not in streamed.text()


def test_case_03_broken_bytes_come_at_the_end(scripts: Scripts) -> None:
    ids = scripts.tokenizers["chatglm2"].text_ids("好😀")
    server = scripts.start(ids[:-1])
    streamed = stream_of(server.chat(stream=True))
    assert streamed.text() == chat_of(server.chat()).choices[0].message.content
    assert streamed.text().startswith("好\ufffd")


def test_case_04_text_that_is_cleaned_later(scripts: Scripts) -> None:
    server = scripts.start("ok,你好", "chatglm")
    assert stream_of(server.chat(stream=True)).text() == "ok，你好"
    assert chat_of(server.chat()).choices[0].message.content == "ok，你好"


@pytest.mark.parametrize("family", GENERATIONS)
def test_case_04_year_and_blanks(family: str, scripts: Scripts) -> None:
    server = scripts.start("  [[训练时间]] ", family)
    assert stream_of(server.chat(stream=True)).text() == "2023年"
    assert chat_of(server.chat()).choices[0].message.content == "2023年"


def test_case_05_first_chunk_and_finish_chunk(scripts: Scripts) -> None:
    chunks = stream_of(scripts.start("早点休息").chat(stream=True)).chunks
    first, *content, last = chunks
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in content] == [None] * len(content)
    assert [chunk.choices[0].finish_reason for chunk in (first, *content)] == [None] * (len(content) + 1)
    assert last.choices[0].delta.model_dump(exclude_unset=True) == {}
    assert last.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_case_06_last_line(reason, scripts: Scripts) -> None:
    server = scripts.answers(TextDelta("好"), CallStart(0, "now"), CallDelta(0, "{}"), Finished(reason, 3, 4))
    assert stream_of(server.chat(stream=True)).finishes() == [reason]  # `stream_of` checks the last line


def test_case_07_one_id(live: RunningServer) -> None:
    streams = [stream_of(live.chat(stream=True, max_tokens=4)).chunks for _ in range(2)]
    for chunks in streams:
        assert (
            len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
        )
        assert chunks[0].id.startswith("chatcmpl-")
    assert streams[0][0].id != streams[1][0].id


def test_case_08_usage_asked_for(live: RunningServer) -> None:
    fields = {"max_tokens": 4, "temperature": 0}
    streamed = stream_of(live.chat(stream=True, stream_options={"include_usage": True}, **fields))
    assert streamed.chunks[-1].choices == []
    assert all(raw["usage"] is None for raw in streamed.raw[:-1])
    whole = chat_of(live.chat(**fields))
    assert whole.usage is not None
    assert streamed.usages == [whole.usage.model_dump(exclude_unset=True)]
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.completion_tokens == 4


@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {}}])
def test_case_09_usage_not_asked_for(options, live: RunningServer) -> None:
    streamed = stream_of(live.chat(stream=True, max_tokens=2, **options))
    assert all("usage" not in raw for raw in streamed.raw)
    assert all(raw["choices"] for raw in streamed.raw)


def test_case_09_options_without_a_stream(live: RunningServer) -> None:
    assert_refused(live.chat(stream_options={"include_usage": True}), param="stream_options")
    assert_refused(live.completion("好", stream_options={}), param="stream_options")


def test_case_11_only_data_and_comments(scripts: Scripts) -> None:
    server = scripts.start("早点休息")
    server.state.limits = type(server.state.limits)(keep_alive_seconds=0.02)
    engine = server.state.chat.engine
    engine.paused.clear()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        stream = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "好"}], stream=True
        )
        assert next(stream).choices[0].delta.role == "assistant"
        raw = b""
        with client.chat.completions.with_streaming_response.create(
            model="base", messages=[{"role": "user", "content": "好"}], stream=True
        ) as reply:
            for data in reply.iter_bytes():
                raw += data
                if raw.count(b": keep-alive\n\n") == 2:
                    engine.paused.set()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "早点休息"
    assert raw.endswith(b"data: [DONE]\n\n")
    assert all(line == b"" or line.startswith((b"data: ", b": keep-alive")) for line in raw.split(b"\n"))


def test_case_12_two_choices_streamed(scripts: Scripts) -> None:
    server = scripts.start("早点休息")
    streamed = stream_of(server.chat(stream=True, n=2, stream_options={"include_usage": True}))
    assert [streamed.text(index) for index in (0, 1)] == ["早点休息", "早点休息"]
    assert [streamed.finishes(index) for index in (0, 1)] == [["stop"], ["stop"]]
    whole = chat_of(server.chat(n=2))
    assert [choice.index for choice in whole.choices] == [0, 1]
    prompt = len(server.state.chat.engine.requests[0].prompt_ids)
    answer = len(scripts.tokenizers["chatglm2"].text_ids("早点休息")) + 1
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 2 * answer)
    assert streamed.usages == [whole.usage.model_dump(exclude_unset=True)]


@pytest.mark.parametrize("family", GENERATIONS)
def test_case_13_end_tokens_never_show(family: str, scripts: Scripts) -> None:
    tokenizer = scripts.tokenizers[family]
    server = scripts.start("早点", family)
    engine = server.state.chat.engine
    for end in server.state.chat.template.stop_ids(tokenizer):
        engine.end = end
        for fields in ({}, {"ignore_eos": True, "max_tokens": 9}):
            whole = chat_of(server.chat(**fields)).choices[0].message.content
            assert whole == "早点" == stream_of(server.chat(stream=True, **fields)).text()
            assert completion_of(server.completion("好", **fields)).choices[0].text.strip() == "早点"


def test_failure_on_the_way_is_an_event(scripts: Scripts) -> None:
    server = scripts.answers(TextDelta("早"), Finished("failed", 3, 1, error="Memory does not suffice."))
    found = events(server.chat(stream=True))
    assert found[-1] == "[DONE]"
    assert json.loads(found[-2])["error"]["message"] == "Memory does not suffice."
    assert_refused(server.chat(), 500, code="engine_error")
    with pytest.raises(openai.APIError, match="Memory does not suffice"):
        list(
            server.openai.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "好"}], stream=True
            )
        )


def test_what_the_engine_stops_is_no_answer(scripts: Scripts) -> None:
    server = scripts.answers(TextDelta("早"), Finished("cancelled", 3, 1))
    assert_refused(server.chat(), 503, code="stopping")
    assert json.loads(events(server.chat(stream=True))[-2])["error"]["code"] == "stopping"
