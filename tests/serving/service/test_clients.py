"""Cases of clients: two at once, one that leaves, one that does not read, a thousand, and whoever watches."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.serving.service.served import (
    CHAT,
    LONG,
    SHORT,
    Served,
    events,
    read_until,
    request_bytes,
    serve,
)

RUNNING = "glmtune_requests_running"
STREAM = LONG | {"stream": True}


def num_new_tokens(line: str) -> int:
    """Return the tokens that a line of the log says were generated."""
    return int(line.partition(" tokens")[0].rpartition("+")[2])


def test_case_46_two_streams_interleave(served: Served) -> None:
    with served.begin(STREAM) as first, served.begin(SHORT | {"stream": True}) as second:
        read_until(first, b"data: ")
        whole = read_until(second, b"[DONE]")
        assert [event for event in events(whole) if event == "[DONE]"]
        # The first is far from its end, and is still being written.
        assert served.metric(RUNNING) == 1
        read_until(first, b"data: ")
    served.await_metric(RUNNING, 0)


def test_case_46_no_text_of_one_in_the_other(served: Served) -> None:
    questions = ["12+30等于多少？", "晚上睡不着应该怎么办？", "你好", "what is the capital of france?"]
    bodies = [
        {"messages": [{"role": "user", "content": question}], "max_tokens": 40, "temperature": 0}
        for question in questions
    ]
    alone = [served.ask(CHAT, body).json["choices"][0]["message"]["content"] for body in bodies]
    clients = [served.begin(body | {"stream": True}) for body in bodies * 3]
    try:
        streams = [read_until(client, b"[DONE]") for client in clients]
    finally:
        for client in clients:
            client.close()
    said = [text_of(stream) for stream in streams]
    assert said == alone * 3
    assert len(set(alone)) == len(questions)


def text_of(stream: bytes) -> str:
    """Return the text of a stream of chunks."""
    chunks = [event for event in events(stream) if event != "[DONE]"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_case_20_what_fits_later_waits() -> None:
    with serve("engine.max_batch_tokens=300") as served, served.begin(STREAM | {"max_tokens": 270}) as first:
        read_until(first, b"data: ")
        never = served.ask(CHAT, LONG | {"max_tokens": 400})
        assert (never.status, never.error["type"]) == (400, "invalid_request_error")
        assert "400" in never.error["message"]
        assert "300" in never.error["message"]
        with served.begin(SHORT | {"max_tokens": 60}) as second:
            served.await_metric("glmtune_requests_waiting", 1)
            assert served.metric(RUNNING) == 1
            assert b"[DONE]" in read_until(first, b"[DONE]")
            assert b" 200 " in read_until(second, b'"usage"')
        served.await_metric("glmtune_requests_waiting", 0)
        served.await_metric(RUNNING, 0)


def test_case_19_far_too_much_takes_no_memory(served: Served) -> None:
    far = [
        LONG | {"max_tokens": 10**9},
        LONG | {"n": 10**6},
        LONG | {"n": 10**6, "max_tokens": 10**9, "stream": True},
        LONG | {"top_logprobs": 10**9, "logprobs": True},
    ]
    assert served.ask(CHAT, SHORT).status == 200
    before = served.metric("process_resident_memory_bytes")
    for body in far * 5:
        refused = served.ask(CHAT, body)
        assert (refused.status, refused.error["type"]) == (400, "invalid_request_error")
    assert served.metric("process_resident_memory_bytes") - before < 16 * 2**20
    assert served.metric(RUNNING) == served.metric("glmtune_requests_waiting") == 0


def test_case_47_streaming_client_leaves(served: Served) -> None:
    with served.begin(STREAM | {"user": "leaves"}) as client:
        read_until(client, b"data: ")
        served.await_metric(RUNNING, 1)
    served.await_metric(RUNNING, 0)
    assert served.ask(CHAT, SHORT).status == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/"])
def test_case_47_waiting_client_leaves(served: Served, path: str) -> None:
    body = {
        CHAT: LONG,
        "/v1/completions": {"prompt": "你好", "max_tokens": 900, "ignore_eos": True},
        "/": {"prompt": "你好", "max_length": 1000},
    }[path]
    name = f"left-{path.count('/')}-{len(path)}"
    with served.connect() as client:
        client.sendall(request_bytes(body, path, f"X-Request-ID: {name}\r\n"))
        served.await_metric(RUNNING, 1)
    served.await_metric(RUNNING, 0)
    if path != "/":  # the model ends that answer by itself, perhaps before anybody noticed
        line = served.await_line(name)
        assert f"{path} 499" in line
        assert num_new_tokens(line) < 900


def test_case_49_client_that_does_not_read() -> None:
    with serve("limits.send_seconds=1") as served:
        before = served.metric("process_resident_memory_bytes")
        with served.connect(SO_RCVBUF=2048) as idle:
            idle.sendall(request_bytes(STREAM, headers="X-Request-ID: idle\r\n"))
            served.await_metric(RUNNING, 1)
            # Others are answered, meanwhile or after it.
            assert served.ask(CHAT, SHORT).status == 200
            # Either all of it found room in buffers of known size, or the client was dropped.
            line = served.await_line("id idle", 60)
            assert f"{CHAT} 200" in line or f"{CHAT} 499" in line
        assert served.metric("process_resident_memory_bytes") < before + 64 * 2**20


def assert_requests_leave_nothing(served: Served, num_requests: int) -> None:
    """Send requests of every kind, and compare the memory before and after."""

    def send(number: int) -> None:
        body = LONG | {"max_tokens": 2 + number % 5}
        if number % 4 == 0:
            with served.begin(body | {"stream": True}) as client:
                read_until(client, b"data: ")  # and leave
        elif number % 4 == 1:
            assert served.ask(CHAT, body | {"messages": "none"}).status == 400
        else:
            assert served.ask(CHAT, body).status == 200

    for number in range(40):  # until allocators and caches have their size
        send(number)
    served.await_metric(RUNNING, 0)
    before = served.metric("process_resident_memory_bytes")
    for number in range(num_requests):
        send(number)
    served.await_metric(RUNNING, 0)
    assert served.metric("glmtune_cache_tokens") == 0
    assert served.metric("process_resident_memory_bytes") - before < 48 * 2**20
    assert served.metric("process_open_fds") < 64


def test_case_50_many_requests_leave_nothing(served: Served) -> None:
    assert_requests_leave_nothing(served, 80)


@pytest.mark.slow
def test_case_50_a_thousand_requests_leave_nothing(served: Served) -> None:
    assert_requests_leave_nothing(served, 1000)


def test_case_51_health_during_long_prompts(served: Served) -> None:
    """Rendering and tokenizing run elsewhere than the event loop: health is answered before these are done."""
    body = {"messages": [{"role": "user", "content": "晚上睡不着应该怎么办？" * 1500}], "max_tokens": 1}
    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(served.ask(CHAT, body).status)) for _ in range(3)]
    for thread in threads:
        thread.start()
    num_meanwhile = 0
    while any(thread.is_alive() for thread in threads):
        assert served.ask("/health").json == {"status": "ready"}
        num_meanwhile += len(done) < 3
    assert done == [400, 400, 400]  # longer than the context, which only its tokens tell
    assert num_meanwhile > 0


def test_case_51_health_says_loading_and_ready() -> None:
    with serve(waits=False) as served:
        first = served.ask("/health")
        assert (first.status, first.json) in [(503, {"status": "loading"}), (200, {"status": "ready"})]
        if first.status == 503:
            early = served.ask(CHAT, SHORT)
            assert early.status in (200, 503)
        deadline = time.monotonic() + 60
        while (now := served.ask("/health")).status != 200:
            assert now.json == {"status": "loading"}
            assert time.monotonic() < deadline
        assert now.json == {"status": "ready"}


def test_too_many_at_once_are_refused() -> None:
    with serve("limits.max_requests=1") as served, served.begin(STREAM) as client:
        read_until(client, b"data: ")
        refused = served.ask(CHAT, SHORT)
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        assert refused.error["type"] == "rate_limit_error"
        assert "limits.max_requests" in refused.error["message"]
        assert served.ask("/health").status == 200  # whoever watches is never counted


def test_a_request_that_takes_too_long_is_ended() -> None:
    with serve("limits.request_seconds=0.5") as served:
        with served.begin(STREAM) as client:
            last = events(read_until(client, b"\r\n0\r\n"))[-1]
        assert last["error"]["code"] == "request_timeout"
        late = served.ask(CHAT, LONG)
        assert (late.status, late.error["code"]) == (504, "request_timeout")
        served.await_metric(RUNNING, 0)


def test_too_many_connections_are_closed() -> None:
    with serve("limits.max_connections=2") as served:
        with served.connect() as one, served.connect() as two, served.connect() as three:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"ready" in read_until(one, b"}")
            assert is_closed(three)
            two.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"ready" in read_until(two, b"}")


def is_closed(client: socket.socket) -> bool:
    """Whether the other side closes a connection."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
