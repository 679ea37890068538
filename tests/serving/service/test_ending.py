"""Case 55 and its relatives: how the process ends."""

from __future__ import annotations

import signal
import time

import pytest

from tests.serving.service.served import CHAT, LONG, SHORT, events, read_until, serve

STREAM = LONG | {"stream": True}
STREAM_END = b"\r\n0\r\n\r\n"


def test_case_55_sigterm_drains() -> None:
    with serve("limits.drain_seconds=60") as served:
        with served.begin(LONG | {"stream": True, "max_tokens": 60}) as client:
            read_until(client, b"data: ")
            served.signal(signal.SIGTERM)
            deadline = time.monotonic() + 30
            while (health := served.ask("/health")).json != {"status": "draining"}:
                assert time.monotonic() < deadline
            assert health.status == 503
            refused = served.ask(CHAT, SHORT)
            assert refused.status == 503
            assert refused.headers["Retry-After"]
            assert refused.error["type"] == "server_error"
            # What runs goes on to its own end.
            assert events(read_until(client, b"[DONE]"))[-1] == "[DONE]"
        assert served.wait() == 0
        assert "may finish within 60 s" in served.said()
        assert "Traceback" not in served.said()


def test_case_55_at_the_limit_streams_end_with_an_error() -> None:
    with serve("limits.drain_seconds=0.3") as served:
        # The stream begins last: its first piece says that the other request was taken as well.
        with served.begin(LONG) as whole, served.begin(STREAM) as streamed:
            read_until(streamed, b"data: ")
            served.signal(signal.SIGTERM)
            last = events(read_until(streamed, STREAM_END))[-1]
            assert last["error"]["code"] == "server_shutdown"
            reply = read_until(whole, b"server_shutdown")
            assert reply.startswith(b"HTTP/1.1 503")
        assert served.wait() == 0


def test_case_55_second_signal_ends_at_once() -> None:
    with serve("limits.drain_seconds=3600") as served:
        with served.begin(STREAM) as client:
            read_until(client, b"data: ")
            served.signal(signal.SIGINT)
            served.await_line("a second signal ends them at once")
            served.signal(signal.SIGTERM)
            assert events(read_until(client, STREAM_END))[-1]["error"]["code"] == "server_shutdown"
        assert served.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_case_55_idle_server_ends(number: int) -> None:
    with serve("limits.drain_seconds=3600") as served:
        with served.connect() as idle:  # a connection that asks for nothing holds nobody up
            served.signal(number)
            assert served.wait() == 0
            assert idle.recv(1) == b""


def test_case_55_while_it_loads() -> None:
    with serve("limits.drain_seconds=3600", waits=False) as served:
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
        assert "Traceback" not in served.said()


def test_a_model_that_cannot_be_loaded_ends_the_process() -> None:
    with serve("model.source=/no/such/model", waits=False) as served:
        code = served.wait()
        assert code not in (0, None)
        assert "/no/such/model" in served.said()
        assert "Traceback" not in served.said()


def test_an_adapter_that_cannot_be_loaded_ends_the_process() -> None:
    with serve("prefix_path={style:/no/such/run}", waits=False) as served:
        assert served.wait() not in (0, None)
        assert "/no/such/run" in served.said()
        assert "Traceback" not in served.said()
