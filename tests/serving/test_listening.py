"""Sockets: what is refused before a model loads, and how the address is written."""

from __future__ import annotations

import errno
import socket

import pytest

from glmtune import listening
from glmtune.errors import ConfigError
from glmtune.listening import is_loopback, listen, url_of


def close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


def test_a_free_port() -> None:
    sockets = listen("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    assert url_of(sockets, "127.0.0.1") == f"http://127.0.0.1:{port}"
    assert is_loopback(sockets)
    with pytest.raises(ConfigError, match=rf"`port` is {port}, but another process .* `port={port + 1}`"):
        listen("127.0.0.1", port)
    close(sockets)


def test_all_networks() -> None:
    sockets = listen("0.0.0.0", 0)
    assert url_of(sockets, "0.0.0.0").startswith("http://127.0.0.1:")
    assert not is_loopback(sockets)
    close(sockets)


def test_names_with_several_addresses_share_a_port() -> None:
    sockets = listen("localhost", 0)
    assert len({each.getsockname()[1] for each in sockets}) == 1
    assert url_of(sockets, "localhost").startswith("http://localhost:")
    assert is_loopback(sockets)
    close(sockets)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 300, "256.1.1.1"])
def test_hosts_that_are_not_here(host: str) -> None:
    with pytest.raises(ConfigError, match=r"`host` is .*Use 127.0.0.1"):
        listen(host, 0)


def test_a_port_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listening, "_bound", refuse)
    with pytest.raises(ConfigError, match=r"`port` is 80, but ports below 1024 .* `port=8000`"):
        listen("127.0.0.1", 80)
