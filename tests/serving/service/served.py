"""A `glmtune serve` of its own process, and clients as low as the socket."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.warm.start import warm_python

REPO = Path(__file__).resolve().parents[3]
START_SECONDS = 120
CHAT = "/v1/chat/completions"
LONG = {
    "messages": [{"role": "user", "content": "你好"}],
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 0,
}
SHORT = LONG | {"max_tokens": 4}


@dataclass
class Reply:
    """An HTTP reply, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, after a look at its form."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"]
        return error


@dataclass
class Served:
    """A running server.

    Attributes:
        url: its address.
        process: its process.
        lines: what it said so far, both streams.
    """

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, timeout: float = 60, **headers: str
    ) -> Reply:
        """Send a request; a dictionary goes as JSON, bytes as they are."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None and "Content-Type" not in fields:
            fields["Content-Type"] = "application/json"
        request = urllib.request.Request(self.url + path, data, fields, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as reply:
                return Reply(reply.status, reply.headers, reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.headers, error.read())

    def metric(self, name: str, **headers: str) -> float:
        """Return a figure of /metrics, by its name with labels."""
        text = self.ask("/metrics", **headers).body.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not in\n{text}"
        return float(found[1])

    def await_metric(self, name: str, value: float, seconds: float = 30) -> None:
        """Wait until a figure has a value."""
        deadline = time.monotonic() + seconds
        while (now := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}, not {value}, after {seconds} s"
            time.sleep(0.05)

    def connect(self, **options: int) -> socket.socket:
        """Connect; options such as SO_RCVBUF are set before."""
        client = socket.socket()
        for name, value in options.items():
            client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        client.settimeout(60)
        client.connect(("127.0.0.1", self.port))
        return client

    def begin(self, body: Any, path: str = CHAT, **options: int) -> socket.socket:
        """Send a whole request by hand, and leave its reply to the caller."""
        client = self.connect(**options)
        client.sendall(request_bytes(body, path))
        return client

    def said(self) -> str:
        return "".join(self.lines)

    def await_line(self, words: str, seconds: float = 30) -> str:
        """Return the first line it said with these words; a request's line comes after its reply."""
        deadline = time.monotonic() + seconds
        while not (found := [line for line in self.lines if words in line]):
            assert time.monotonic() < deadline, f"no line with {words!r} in\n{self.said()}"
            time.sleep(0.05)
        return found[0]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        """Return its exit code."""
        return self.process.wait(seconds)


def request_bytes(body: Any, path: str = CHAT, headers: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def read_until(client: socket.socket, word: bytes) -> bytes:
    """Read from a socket until a word came."""
    got = b""
    while word not in got:
        data = client.recv(65536)
        assert data, f"closed after {got[-500:]!r}"
        got += data
    return got


def read_all(client: socket.socket) -> bytes:
    """Read from a socket until its other side closes it."""
    got = b""
    while data := client.recv(65536):
        got += data
    return got


def events(stream: bytes) -> list[Any]:
    """Return the events of a stream as JSON, `[DONE]` as text."""
    found = [line[6:] for line in stream.decode().splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in found]


@contextmanager
def serve(
    *words: str,
    environment: Mapping[str, str] | None = None,
    waits: bool = True,
    python: Sequence[str] | None = None,
) -> Iterator[Served]:
    """Run `glmtune serve` with settings while the block runs.

    Args:
        words: settings.
        environment: further variables.
        waits: whether to wait until it takes requests.
        python: the command line's beginning, if not a warm Python.
    """
    command = [*(python or warm_python()), "-m", "glmtune", "serve", "port=0", *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **(environment or {})}
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO
    )
    served, first = Served("", process), queue.SimpleQueue[str | None]()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            served.lines.append(line)
            if " serves " in line:
                first.put(line.split()[0])
        first.put(None)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        url = first.get(timeout=START_SECONDS)
        assert url, f"it did not start: {served.said()}"
        served.url = url
        deadline = time.monotonic() + START_SECONDS
        while waits and served.ask("/health").status != 200:
            assert time.monotonic() < deadline, served.said()
            time.sleep(0.05)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        thread.join(10)
