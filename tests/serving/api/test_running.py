"""SERVER_CASES, 47 and 49 as far as they are the routes': clients that go away, clients that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from glmtune.inference.requests.chat import CallDelta, CallStart, Finished, TextDelta
from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.running import RunningRequest
from glmtune.serving.api.state import AnsweredRequest
from tests.serving.api.conftest import Scripts
from tests.serving.api.running_server import RunningServer


def until(is_so: Callable[[], bool]) -> bool:
    """Wait for something; no test depends on how long it takes."""
    end = time.monotonic() + 20
    while not is_so() and time.monotonic() < end:
        time.sleep(0.005)
    return is_so()


def sent(server: RunningServer, path: str, body: dict[str, object]) -> socket.socket:
    data = json.dumps(body).encode()
    address = urlsplit(server.url)
    client = socket.create_connection((address.hostname, address.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "好"}], "n": 2},
    "/v1/completions": {"prompt": ["好", "早"]},
    "/": {"prompt": "好"},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", BODIES)
def test_case_47_client_gone(path: str, stream: bool, scripts: Scripts) -> None:
    server = scripts.start("早" * 500)
    told: list[AnsweredRequest] = []
    server.state.on_answered = told.append
    engine = server.state.chat.engine
    engine.paused.clear()
    body = BODIES[path] | ({"stream": True} if stream and path != "/" else {})
    client = sent(server, path, body)
    num = 1 if path == "/" else 2
    assert until(lambda: engine.num_running == num)
    client.close()
    assert until(lambda: engine.num_running == 0)
    assert engine.cancelled == num
    assert engine.num_written == 0
    assert until(lambda: len(told) == 1)
    assert told[0].finish_reasons == ("cancelled",) * num


def test_case_49_client_that_does_not_read(scripts: Scripts) -> None:
    server = scripts.start("早" * 3000)
    slow = sent(
        server,
        "/v1/chat/completions",
        {**BODIES["/v1/chat/completions"], "stream": True, "logprobs": True, "top_logprobs": 20},
    )
    engine = server.state.chat.engine
    assert until(lambda: engine.num_running == 2)
    other = server.chat(max_tokens=50, stream=True)
    assert other.text.endswith("data: [DONE]\n\n")
    assert until(lambda: engine.num_running == 0)  # the engine waited for nobody
    slow.close()


def run(events: list[list[object]], **settings: object) -> tuple[list[list[tuple[int, object]]], list[int]]:
    """Return the batches that come of events put at once, and which answers were cancelled."""
    cancelled: list[int] = []

    class Handle:
        def __init__(self, index: int) -> None:
            self.index = index

        def cancel(self) -> None:
            cancelled.append(self.index)

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def collect() -> list[list[tuple[int, object]]]:
        running = RunningRequest(path="/", model="m", is_stream=False, **settings)  # type: ignore[arg-type]

        def submit(index: int, put: Callable[[object], None]) -> Handle:
            for event in events[index]:
                put(event)
            return Handle(index)

        for index in range(len(events)):
            running.add(lambda put, index=index: submit(index, put))
        async with running.watched(receive):  # type: ignore[arg-type]
            return [batch async for batch in running.batches()]

    return asyncio.run(collect()), cancelled


def test_neighbours_are_joined() -> None:
    end = Finished("stop", 3, 4)
    first = [
        TextDelta("a"),
        TextDelta("b"),
        CallStart(0, "f"),
        CallDelta(0, "{"),
        CallDelta(0, "}"),
        TextDelta("c"),
        end,
    ]
    batches, cancelled = run([first, [TextDelta("x"), TextDelta("y"), end]])
    assert batches == [
        [
            (0, TextDelta("ab")),
            (0, CallStart(0, "f")),
            (0, CallDelta(0, "{}")),
            (0, TextDelta("c")),
            (0, end),
            (1, TextDelta("xy")),
            (1, end),
        ]
    ]
    assert cancelled == []


def test_answer_ends_at_its_first_call() -> None:
    said = [
        CallStart(0, "f"),
        CallDelta(0, "{}"),
        CallStart(1, "g"),
        CallDelta(1, "{}"),
        Finished("cancelled", 3, 9),
    ]
    batches, cancelled = run([said], ends_at_first_call=True)
    assert batches == [[(0, CallStart(0, "f")), (0, CallDelta(0, "{}")), (0, Finished("tool_calls", 3, 9))]]
    assert cancelled == [0]


def test_a_failed_answer_ends_the_others() -> None:
    with pytest.raises(ApiError, match="no memory"):
        run([[TextDelta("a"), Finished("failed", 3, 1, error="no memory")], [TextDelta("a")]])
