"""The sockets that a server listens on: made before the model loads, so a taken port is known at once."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket

from glmtune.errors import ConfigError

BACKLOG = 512
"""Connections that the system holds until they are taken."""

SEND_BUFFER_BYTES = 65536
"""What the system holds for a client that does not read; by itself it would grow to megabytes for each."""


def listen(
    host: str, port: int, *, host_setting: str = "host", port_setting: str = "port"
) -> list[socket.socket]:
    """Listen on all addresses of a host.

    Args:
        host: a name or an address of this machine; ``localhost`` has two, for IPv4 and IPv6.
        port: 0 takes a free one, the same for all addresses.
        host_setting: what the user calls the host, for messages.
        port_setting: what the user calls the port.

    Raises:
        ConfigError: the port is taken or needs other rights, or the host is not this machine's.
    """
    bare, names = host.strip("[]"), (host_setting, port_setting)
    try:
        found = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"`{host_setting}` is `{host}`, but it must be a name or an address of this machine ({error})."
            " Use 127.0.0.1 for this machine alone, or 0.0.0.0 for all its networks."
        ) from None
    sockets: list[socket.socket] = []
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            sockets.append(_bound(family, (address[0], port, *address[2:])))
        except OSError as error:
            # `localhost` stands for ::1 as well where the machine has no IPv6 at all.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                continue
            for each in sockets:
                each.close()
            raise ConfigError(_why(error, host, port, names)) from None
        port = port or sockets[0].getsockname()[1]
    if not sockets:
        raise ConfigError(_why(OSError(errno.EADDRNOTAVAIL, ""), host, port, names))
    return sockets


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            # A server that ended a moment ago leaves connections behind that would hold the port for a
            # minute.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            # There the same option would let two servers share a port; this one forbids it.
            with contextlib.suppress(AttributeError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # of its connections, too
        listener.bind(address)
        # Now, not when the loop runs: of two servers that start at once the second must know here.
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _why(error: OSError, host: str, port: int, names: tuple[str, str]) -> str:
    """Word why nobody can listen there, with the way out."""
    host_setting, port_setting = names
    if error.errno == errno.EADDRINUSE:
        return (
            f"`{port_setting}` is {port}, but another process listens on {host}:{port} already. Stop it,"
            f" or use another port: `{port_setting}={port + 1 if port < 65535 else 8000}` (0 takes a free"
            " one)."
        )
    if error.errno == errno.EACCES:
        return (
            f"`{port_setting}` is {port}, but ports below 1024 need the rights of the system. Use one from"
            f" 1024 on, such as `{port_setting}=8000`, and let a proxy such as nginx hand over."
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return (
            f"`{host_setting}` is `{host}`, but it is no address of this machine. Use 127.0.0.1 for this"
            " machine alone, or 0.0.0.0 for all its networks."
        )
    return (
        f"`{host_setting}` is `{host}` and `{port_setting}` is {port}, but nobody can listen there:"
        f" {error.strerror}."
    )


def url_of(sockets: list[socket.socket], host: str) -> str:
    """Return the address under which this machine reaches the server."""
    bound, port = sockets[0].getsockname()[:2]
    if ipaddress.ip_address(bound.partition("%")[0]).is_unspecified:
        name = "127.0.0.1" if sockets[0].family == socket.AF_INET else "[::1]"
    else:
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{name}:{port}"


def is_loopback(sockets: list[socket.socket]) -> bool:
    """Whether only this machine reaches the server."""
    addresses = (each.getsockname()[0].partition("%")[0] for each in sockets)
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)
