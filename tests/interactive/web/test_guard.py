"""What the page's server lets through, and under which names."""

from __future__ import annotations

import asyncio
import http.client
from urllib.parse import urlsplit

import pytest

from glmtune.interactive.web.guard import JOIN, STREAM, Guard, preferred_language
from tests.interactive.web.conftest import serving


def ask(url: str, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=20)
    connection.request(method, path, body=b"{}" if method == "POST" else None, headers=headers)
    reply = connection.getresponse()
    status, found, text = reply.status, dict(reply.getheaders()), reply.read().decode("utf-8", "replace")
    connection.close()
    return status, {name.lower(): value for name, value in found.items()}, text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://elsewhere.invalid/"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/upload"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/gradio_api/run/ask"),
        ("POST", "/gradio_api/call/ask"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/mcp/sse"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/?deep_link=x"),
        ("GET", "/assets/../../../../etc/passwd"),
        ("GET", "/static/..%2f..%2f..%2fetc/passwd"),
        ("DELETE", "/"),
        ("OPTIONS", "/gradio_api/queue/join"),
    ],
)
def test_what_a_chat_needs_not_is_not_there(scripted, method: str, path: str) -> None:
    status, _, text = ask(scripted.url, method, path)
    assert status in (403, 404)
    assert "root:" not in text


def test_other_names_and_other_pages_are_refused(scripted) -> None:
    assert ask(scripted.url, "GET", "/", Host="evil.example")[0] == 421
    assert ask(scripted.url, "GET", "/", Host="localhost:1")[0] == 200
    assert ask(scripted.url, "POST", "/gradio_api/queue/join", Origin="http://evil.example")[0] == 403
    assert ask(scripted.url, "POST", "/gradio_api/queue/join", Origin="null")[0] == 403
    length = {"Content-Length": str(10**9)}
    assert ask(scripted.url, "POST", "/gradio_api/queue/join", **length)[0] == 413


def test_the_page_comes_with_its_policy(scripted) -> None:
    status, headers, text = ask(scripted.url, "GET", "/")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "connect-src 'self'" in policy
    assert "script-src 'self' 'nonce-" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert headers["x-content-type-options"] == "nosniff"
    assert text.count("<script") == text.count("<script nonce=")
    assert "https://" not in text.partition("window.gradio_config")[0], "nothing names another host"
    assert ask(scripted.url, "GET", "/", Origin=scripted.url)[1].get("access-control-allow-origin") is None


def test_the_language_is_the_browsers_unless_one_is_chosen(scripted) -> None:
    status, headers, _ = ask(scripted.url, "GET", "/", **{"Accept-Language": "zh-CN,zh;q=0.9"})
    assert (status, headers["location"]) == (307, "/zh")
    assert ask(scripted.url, "GET", "/?lang=en", **{"Accept-Language": "zh-CN"})[0] == 200
    assert ask(scripted.url, "GET", "/zh", **{"Accept-Language": "en"})[0] == 200
    assert [preferred_language(text) for text in ("", "de", "en;q=0.1, zh;q=x", "zh-TW")] == [
        "en",
        "en",
        "en",
        "zh",
    ]


def test_a_chosen_name_is_answered() -> None:
    with serving(allowed_hosts=["chat.example.com"], language="zh") as served:
        assert ask(served.url, "GET", "/?lang=zh", Host="chat.example.com")[0] == 200
        assert ask(served.url, "GET", "/", Host="chat.example.com")[0] == 307
        assert ask(served.url, "GET", "/", Host="127.0.0.1")[0] == 421


def test_an_event_is_accepted_once_its_page_has_left_the_stream_that_closes() -> None:
    said: list[str] = []

    async def app(scope, receive, send) -> None:
        if scope["path"] == JOIN:
            await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = b'data: {"msg":"close_stream"}\n\n' if scope["path"] == STREAM else b"{}"
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def request(method: str, path: str, query: bytes, body: bytes, has_left: asyncio.Event) -> None:
        messages = iter([{"type": "http.request", "body": body}])

        async def receive():
            for message in messages:
                return message
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            said.append(f"{path.rpartition('/')[2]} {message['type'].rpartition('.')[2]}")

        scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": []}
        await guard(scope, receive, send)

    async def both() -> None:
        has_left = asyncio.Event()
        stream = asyncio.create_task(request("GET", STREAM, b"session_hash=me", b"", has_left))
        await asyncio.sleep(0)
        for _ in range(10):  # of another page: nothing to wait for
            await request("POST", JOIN, b"", b'{"data":[],"session_hash":"other"}', has_left)
        said.append("others done")
        join = asyncio.create_task(request("POST", JOIN, b"", b'{"data":[],"session_hash":"me"}', has_left))
        for _ in range(20):
            await asyncio.sleep(0)
        said.append("left")
        has_left.set()
        await asyncio.gather(stream, join)

    guard = Guard(app, allowed_hosts=None, language="en")
    asyncio.run(both())
    place = said.index("others done")
    assert said[place : place + 2] == ["others done", "left"], "accepted only now"
    assert "join start" in said[place + 2 :]
