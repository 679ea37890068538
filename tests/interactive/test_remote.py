"""Answers of a server: its stream, its refusals, what is sent to it, and that it is left when nobody reads."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Generator
from typing import Any

import pytest

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.inference.requests.chat import AnswerEvent, CallDelta, CallStart, Finished, TextDelta
from glmtune.inference.requests.sampling import Sampling
from glmtune.interactive.answerer import AdapterChoice
from glmtune.interactive.conversation import AnswerParts
from glmtune.interactive.remote import RemoteAnswerer, server_address
from tests.interactive.scripted_server import MODELS, ScriptedServer, delta, end, scripted_server, sse

QUESTION = [{"role": "user", "content": "你好"}]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLMTUNE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Generator[ScriptedServer]:
    with scripted_server() as script:
        yield script


def events(server: ScriptedServer, sampling: Any = None, **options: Any) -> list[AnswerEvent]:
    answerer = RemoteAnswerer(server.url)
    try:
        return list(answerer.answer(QUESTION, sampling=sampling or {}, **options))
    finally:
        answerer.close()


def error_of(server: ScriptedServer) -> str:
    with pytest.raises(GlmtuneError) as caught:
        events(server)
    return str(caught.value)


def test_text_comes_piece_by_piece_with_its_usage(server: ScriptedServer) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    server.pieces = sse(
        delta(role="assistant"), delta(content="您"), delta(content="好"), end(), {"choices": [], "usage": usage}, "[DONE]"
    )  # fmt: skip
    assert events(server) == [TextDelta("您"), TextDelta("好"), Finished("stop", 5, 3, 2)]
    assert server.asked == [
        {
            "path": "/v1/chat/completions",
            "model": "glm-tiny",
            "messages": QUESTION,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ], "the server decides whatever the user did not choose"


def test_events_cut_anywhere_comments_and_line_ends(server: ScriptedServer) -> None:
    text = "行\u2028内\x85\r\n\x1b[31m"
    body = (
        b": keep-alive\r\n\r\nevent: x\ndata:"
        + json.dumps(delta(content=text), ensure_ascii=False).encode()
        + b"\r\n\r\n: more\n\nretry: 5\ndata: "
        + json.dumps(end("length")).encode()
        + b"\r\rdata: [DONE]\n\n"
    )
    server.pieces = [body[place : place + 1] for place in range(len(body))]
    assert events(server) == [TextDelta(text), Finished("length", 0, 0)]


def test_calls_of_tools(server: ScriptedServer) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return delta(tool_calls=[{"index": index, "function": function}])

    server.pieces = sse(
        call(0, name="a", arguments=""), call(0, arguments='{"x"'), call(0, arguments=": 1}"),
        call(3, name="b", arguments="{}"), end("tool_calls"), "[DONE]",
    )  # fmt: skip
    found = events(server, tools=[{"name": "a"}, {"type": "function", "function": {"name": "b"}}])
    assert found == [
        CallStart(0, "a"), CallDelta(0, '{"x"'), CallDelta(0, ": 1}"), CallStart(1, "b"), CallDelta(1, "{}"),
        Finished("tool_calls", 0, 0),
    ]  # fmt: skip
    assert [tool["function"]["name"] for tool in server.asked[0]["tools"]] == ["a", "b"]


def test_an_answer_in_one_piece(server: ScriptedServer) -> None:
    server.kind = "application/json"
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}],
    }
    content = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    server.pieces = [json.dumps(content).encode()]
    assert events(server) == [CallStart(0, "a"), CallDelta(0, "{}"), Finished("tool_calls", 0, 0)]


def test_what_the_user_chose_is_sent_by_openais_names(server: ScriptedServer) -> None:
    server.pieces = sse(end())
    events(server, {"temperature": 0.0, "max_new_tokens": 7, "seed": 1}, adapter="style", strength=0.5)
    body = server.asked[0]
    assert (body["model"], body["prefix_strength"]) == ("style", 0.5)
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.0, 7, 1)
    assert "top_p" not in body
    events(server, Sampling(temperature=0.8, top_k=5))
    assert {key: server.asked[1].get(key) for key in ("temperature", "top_p", "top_k", "min_p")} == {
        "temperature": 0.8, "top_p": 1.0, "top_k": 5, "min_p": None,
    }  # fmt: skip


def test_the_models_of_a_server(server: ScriptedServer) -> None:
    answerer = RemoteAnswerer(server.url.removesuffix("/v1"), model="law")
    answerer.close()
    assert answerer.model_name == "glm-tiny"
    assert answerer.adapters == (AdapterChoice("style", "prefix"), AdapterChoice("law", "lora"))
    assert answerer.first_adapter == "law"
    with pytest.raises(ConfigError, match=r"`lew`.*Did you mean `law`"):
        RemoteAnswerer(server.url, model="lew")


def test_a_server_without_a_list_needs_a_name(server: ScriptedServer) -> None:
    server.models = (404, {"detail": "Not Found"})
    with pytest.raises(GlmtuneError, match=r"lists no models\. Name one: `url_model=NAME`"):
        RemoteAnswerer(server.url)
    answerer = RemoteAnswerer(server.url, model="any")
    answerer.close()
    assert (answerer.model_name, answerer.adapters) == ("any", ())


def test_the_key_goes_along_and_is_never_shown(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("GLMTUNE_API_KEY", "sk-secret")
    server.kind, server.status = "application/json", 401
    server.pieces = [b'{"error": {"message": "Wrong key: sk-secret\\u001b[31m"}}']
    message = error_of(server)
    assert server.headers["Authorization"] == "Bearer sk-secret"
    assert "HTTP 401" in message
    assert "Wrong key: ***" in message
    assert "GLMTUNE_API_KEY" in message
    assert "sk-secret" not in message
    assert "\x1b" not in message


def test_a_key_that_the_list_refuses(server: ScriptedServer) -> None:
    server.models = (401, {"error": {"message": "No key."}})
    with pytest.raises(GlmtuneError, match=r"refused \(HTTP 401\): No key. Put the server's key"):
        RemoteAnswerer(server.url)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b'{"error": {"message": "No model x."}}', r"HTTP 404\): No model x\. Check `url`"),
        (400, b'{"error": {"message": "Too long."}}', r"HTTP 400\): Too long\."),
        (503, b"", r"HTTP 503.*ask again"),
        (500, b"<html>", r"HTTP 500.*server's log"),
        (200, b"<html>", "no JSON.*Check `url`"),
        (200, b'{"error": {"message": "Inside."}}', "failed: Inside"),
        (200, b"[" * 100_000, "no JSON"),
    ],
)
def test_refusals_in_words(server: ScriptedServer, status: int, body: bytes, message: str) -> None:
    server.kind, server.status, server.pieces = "application/json", status, [body]
    assert re.search(message, error_of(server), re.DOTALL)


def test_a_redirect_is_not_followed(server: ScriptedServer) -> None:
    server.kind, server.status = "application/json", 307
    server.extra = {"Location": "http://elsewhere.example/v1"}
    assert "redirects to http://elsewhere.example/v1" in error_of(server)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (sse(delta(content="a")), "in the middle of its answer"),
        (sse("{nonsense"), "no answer"),
        (sse(delta(content="a"), {"error": {"message": "Out of memory\x1b[31m"}}), "failed: Out of memory"),
        ([b"data: " + b"x" * (5 * 2**20)], "longer than"),
    ],
)
def test_streams_that_break_keep_what_came(server: ScriptedServer, pieces: list[bytes], message: str) -> None:
    server.pieces = pieces
    answerer, parts = RemoteAnswerer(server.url), AnswerParts()

    def read() -> None:
        for event in answerer.answer(QUESTION, sampling={}):
            parts.add(event)

    with pytest.raises(GlmtuneError, match=message) as caught:
        read()
    answerer.close()
    assert "\x1b" not in str(caught.value)
    assert parts.text == ("a" if pieces[0].startswith(b'data: {"choices') else "")


@pytest.mark.parametrize("content", [1, [], {}, {"choices": 5}, {"choices": [None]}, {"choices": [{"delta": 3}]},
    {"choices": [{"delta": {"content": 5, "tool_calls": "x", "function_call": 7}}]},
    {"choices": [{"delta": {"tool_calls": [1, {"index": "0", "function": {"name": 5}}]}}], "usage": 3},
    {"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": "many"}},
])  # fmt: skip
def test_chunks_of_another_form_are_passed_over(server: ScriptedServer, content: Any) -> None:
    server.pieces = sse(content, delta(content="a"), end(), "[DONE]")
    assert events(server) == [TextDelta("a"), Finished("stop", 0, 0)]


@pytest.mark.parametrize("pieces", [[None], [*sse(delta(content="a")), None]])
def test_a_server_is_left_when_nobody_reads(server: ScriptedServer, pieces: list[bytes | None]) -> None:
    server.pieces = pieces
    answerer, parts = RemoteAnswerer(server.url), AnswerParts()
    stream = answerer.answer(QUESTION, sampling={})
    if len(pieces) == 1:
        stream.stop()
    for event in stream:
        parts.add(event)
        if isinstance(event, TextDelta):
            stream.stop()
    assert parts.finished == Finished("cancelled", 0, 0)
    if len(pieces) > 1:
        assert server.is_left.wait(30), "the connection is closed, so that the server can stop"
    answerer.close()


def test_nobody_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(GlmtuneError, match=r"cannot be reached \(Connection refused\).*`glmtune serve`"):
        RemoteAnswerer(f"http://127.0.0.1:{port}/v1")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/chat/completions", "http://localhost:8000/v1"),
        ("https://example.com/api/v4/", "https://example.com/api/v4"),
    ],
)
def test_addresses_as_people_write_them(given: str, shown: str) -> None:
    assert server_address(given).shown == shown


@pytest.mark.parametrize("given", ["ftp://x", "http://", "", "http://a:b@c/@d"])
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(ConfigError, match="`url`"):
        server_address(given)


def test_the_list_is_read_in_bounds(server: ScriptedServer) -> None:
    server.models = (200, {"data": [{"id": "x" * (5 * 2**20)}]})
    with pytest.raises(GlmtuneError, match="sent more than"):
        RemoteAnswerer(server.url)
    server.models = (200, {**MODELS, "data": [1, {"id": 2}, {"id": "a\x1b"}]})
    answerer = RemoteAnswerer(server.url)
    answerer.close()
    assert answerer.model_name == "a\x1b"
