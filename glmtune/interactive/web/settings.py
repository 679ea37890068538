"""Settings of the web page: where it is served, to whom, and how many talk at once."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.settings import check_choice, check_range, setting

USERS_VARIABLE = "GLMTUNE_WEB_USERS"

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class WebSettings:
    """Where the page is served, to whom, and how many talk at once."""

    server_name: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0: all networks of this machine (use a login there)"
    )
    server_port: int = setting(7860, "port to listen on; 0 takes a free one")
    users: str | None = setting(
        None, f"file of USER:PASSWORD lines who may log in; also from the environment: {USERS_VARIABLE}"
    )
    allowed_hosts: list[str] | None = setting(
        None, "names the page answers to (the Host header); default: its own on loopback, all elsewhere"
    )
    language: str = setting("auto", "language at /: auto (the browser's), en, zh")
    max_answers: int = setting(32, "most questions that are answered at once; others wait")
    max_waiting: int = setting(128, "most that wait; who comes then is told so")

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a value out of its range, or a host with more than its name.
        """
        check_range("server_port", self.server_port, low=0, high=65535)
        check_range("max_answers", self.max_answers, low=1, high=4096)
        check_range("max_waiting", self.max_waiting, low=1)
        check_choice("language", self.language, ("auto", "en", "zh"))
        if not self.server_name.strip():
            raise ConfigError(
                "`server_name` is empty. Use 127.0.0.1 for this machine, or 0.0.0.0 for all networks."
            )
        for host in self.allowed_hosts or ():
            if "/" in host or not host:
                raise ConfigError(
                    f"`allowed_hosts` holds `{host}`, but a host is a name such as chat.example.com, without"
                    " scheme, path and port."
                )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the page."""
        name = self.server_name.strip("[]")
        return name in LOOPBACK_HOSTS or name.startswith("127.")

    @property
    def hosts(self) -> list[str] | None:
        """Names in the Host header that are answered; None: all."""
        if self.allowed_hosts is not None:
            return None if "*" in self.allowed_hosts else list(self.allowed_hosts)
        return list(LOOPBACK_HOSTS) if self.is_loopback else None
