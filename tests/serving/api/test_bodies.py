"""SERVER_CASES, 58: hostile bodies; and fields that are obeyed, accepted, ignored or refused."""

from __future__ import annotations

import logging

import pytest

from glmtune.serving.api.fields.extra import ACCEPTED, REFUSED
from tests.serving.api.conftest import Scripts
from tests.serving.api.replies import assert_refused, chat_of
from tests.serving.api.running_server import RunningServer

JSON = {"content-type": "application/json"}
ROUTES = ("/v1/chat/completions", "/v1/completions", "/")
HOSTILE = {
    "nothing": b"",
    "blanks": b" \n",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "好"}'.encode("utf-16"),
    "half a pair": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "NaN": b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    "brackets": b"[" * 100_000,
    "objects": b'{"prompt":' * 100_000,
    "a list": b"[1]",
    "a number": b"7",
    "digits": b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}], "seed": '
    + b"9" * 5000
    + b"}",
    "cut": b'{"prompt": "x"',
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_case_58_hostile_bodies(kind: str, path: str, live: RunningServer) -> None:
    reply = live.post(path, content=HOSTILE[kind], headers=JSON)
    assert assert_refused(reply, 400).isprintable()


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_case_58_other_content_types(kind: str, live: RunningServer) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "max_tokens": 1}'
    for path in ROUTES[:2]:
        message = assert_refused(live.post(path, content=body, headers={"content-type": kind}), 415)
        assert "application/json" in message
    kinds = ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json")
    assert [
        live.post(ROUTES[0], content=body, headers={"content-type": each}).status_code for each in kinds
    ] == [200] * 3


def test_case_58_packed_body(live: RunningServer) -> None:
    for path in ROUTES:
        assert_refused(
            live.post(path, content=b"\x1f\x8b", headers={**JSON, "content-encoding": "gzip"}), 415
        )


def test_paths_and_methods_that_are_not_there(live: RunningServer) -> None:
    assert "/v1/nothing" in assert_refused(live.get("/v1/nothing"), 404)
    assert "POST" in assert_refused(live.get("/v1/completions"), 405)


def test_a_model_that_loads_and_a_server_that_ends(scripts: Scripts) -> None:
    server = scripts.start("好")
    chat, server.state.chat = server.state.chat, None
    for reply in (
        server.chat(),
        server.completion("x"),
        server.get("/v1/models"),
        server.post("/", {"prompt": "x"}),
    ):
        assert_refused(reply, 503, code="loading")
        assert reply.headers["retry-after"]
    server.state.chat, server.state.is_draining = chat, True
    assert_refused(server.chat(), 503, code="stopping")


def test_fields_that_cannot_be_obeyed(scripts: Scripts) -> None:
    server = scripts.start("好")
    for name, (neutral, _) in REFUSED.items():

        def send(value: object, name: str = name):
            fields = {name: value}
            return (
                server.completion("x", **fields) if name in ("best_of", "suffix") else server.chat(**fields)
            )

        assert_refused(send({"any": "thing"}), param=name, code="unsupported_parameter")
        for value in (None, *neutral):
            reply = send(value)
            assert reply.status_code == 200, (name, value, reply.text)
            assert "x-glmtune-ignored-fields" not in reply.headers


def test_fields_that_change_nothing(scripts: Scripts) -> None:
    server = scripts.start("好", is_strict=True)
    fields = {name: {} if name == "metadata" else "x" for name in ACCEPTED}
    assert chat_of(server.chat(**fields)).choices[0].message.content == "好"


def test_unknown_fields_are_named_once(scripts: Scripts, caplog: pytest.LogCaptureFixture) -> None:
    server = scripts.start("好")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reply = server.chat(temprature=1, **{"a\r\nb: c": 1}, stream_options=None)
    assert reply.headers["x-glmtune-ignored-fields"] == "temprature, a??b??c"
    assert sum('"temprature"' in record.message for record in caplog.records) == 1
    server.state.is_strict = True
    assert "`temperature`" in assert_refused(
        server.chat(temprature=1), param="temprature", code="unknown_field"
    )
    assert_refused(
        server.chat(stream=True, stream_options={"x": 1}), param="stream_options.x", code="unknown_field"
    )
