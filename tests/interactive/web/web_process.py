"""`glmtune web` in a process of its own, and every address that it connects to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120

# Installed before anything else in the process under test: every address that it connects to, one a line.
WATCH = """
import os, socket
_log = os.environ["GLMTUNE_TEST_CONNECTIONS"]
def _note(what):
    with open(_log, "a") as file:
        file.write(what + "\\n")
_note("watching")
class _Socket(socket.socket):
    def connect(self, address):
        _note(f"connect {address}")
        return super().connect(address)
    def connect_ex(self, address):
        _note(f"connect {address}")
        return super().connect_ex(address)
    def sendto(self, *words):
        _note(f"sendto {words[-1]}")
        return super().sendto(*words)
socket.socket = _Socket
_resolve = socket.getaddrinfo
def _getaddrinfo(host, *words, **options):
    _note(f"resolve {host}")
    return _resolve(host, *words, **options)
socket.getaddrinfo = _getaddrinfo
"""


@dataclass
class WebProcess:
    """A running `glmtune web`.

    Attributes:
        url: of the page.
        process: what serves it.
        connections: file of the addresses that it connected to, one a line.
        log: file of what it said.
    """

    url: str
    process: subprocess.Popen[bytes]
    connections: Path
    log: Path

    def end(self, number: int = signal.SIGINT) -> int:
        """End it by a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def web_process(
    folder: Path, *words: str, environment: Mapping[str, str] | None = None
) -> Iterator[WebProcess]:
    """Run it while the block runs.

    Args:
        folder: an empty one for its files; it runs there.
        words: further words of the command line.
        environment: further variables.
    """
    (folder / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    places = [str(folder), str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "GLMTUNE_TEST_CONNECTIONS": str(folder / "connections"),
        **(environment or {}),
    }
    # What a developer's machine may have set must not decide: the command itself turns it off.
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        variables.pop(name, None)
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "glmtune", "web", *words, "server_port=0"],
            cwd=folder,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + START_SECONDS
        while "open http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        url = log.read_text().partition("open http://")[2].split()[0]
        yield WebProcess(f"http://{url}", process, folder / "connections", log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
