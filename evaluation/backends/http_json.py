"""JSON over HTTP from one server: bounded, retried, and with secrets that reach this server alone.

Written on the client that huggingface-hub brings along, which gives connections, TLS and the decoding of
bodies in small pieces. What is left to every caller is here: which answers are worth another try, how long to
wait, how much is read, and whom a refusal concerns (one request, or all of them).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from evaluation.backends.http_replies import (
    LONGEST_WAIT_SECONDS,
    MalformedError,
    NotServedError,
    Problem,
    RefusedError,
    read_body,
    seconds_asked,
    status_inside,
)
from glmtune.errors import GlmtuneError
from glmtune.http_client.connection import certificates, is_about_certificates, system_error
from glmtune.http_client.replies import error_message, parse_json
from glmtune.http_client.server_address import ServerAddress, environment_proxy, shown

LOGGER = logging.getLogger(__name__)
Result = TypeVar("Result")

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Answers after which the same request may succeed later."""
ODD_RETRIES = 2
"""Further attempts after a timeout or an answer that is none: it may be a hiccup, and is rarely a queue."""
MAX_REDIRECTS = 5
NOT_ALLOWED = (401, 403, 407)
HINTS = {
    401: "Set the key in the environment variable that `endpoint.api_key_env` names.",
    403: "Set a key that may use this model in the variable that `endpoint.api_key_env` names.",
    404: "Check `endpoint.base_url` (it ends before /chat/completions) and `endpoint.model`.",
    407: "The proxy of the environment asks for a password.",
}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        timeout_seconds: per attempt, from the first byte sent to the last one read.
        max_retries: further attempts while the server is busy or cannot be reached.
        first_wait_seconds: pause before the first of them; it doubles each time, with some chance in it.
    """

    timeout_seconds: float
    max_retries: int
    first_wait_seconds: float


class JsonClient:
    """Connections to one server, for the coroutines of one event loop.

    Attributes:
        date: of the latest answer, by the server's clock; None if it does not say.
    """

    def __init__(self, address: ServerAddress, patience: Patience, *, connections: int) -> None:
        """Prepare; nothing is sent yet.

        Args:
            address: of the server, with what it needs to know of us.
            patience: how long to wait.
            connections: kept open for the next request.

        Raises:
            ConfigError: a proxy of the environment would read the key, or cannot be used.
        """
        self._address, self._patience = address, patience
        # Its INFO lines show whole addresses, and keys may stand in those.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        # The environment is read by `environment_proxy` alone: the client's own rules send what is for this
        # machine, and keys over http://, to whatever proxy is set.
        self._http = httpx2.AsyncClient(
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity", **address.headers},
            timeout=httpx2.Timeout(patience.timeout_seconds),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=connections),
            trust_env=False,
            verify=certificates(),
            proxy=environment_proxy(address),
        )
        self._is_ending = asyncio.Event()
        self.date: str | None = None

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    def end(self) -> None:
        """Let no request be sent any more; those under way may still be answered."""
        self._is_ending.set()

    async def get(self, path: str, read: Callable[[Any], Result]) -> Result:
        """Return what is read in the JSON at a path; a server that cannot be reached is an error at once."""
        return await self._send("GET", path, None, read)

    async def post(self, path: str, body: Mapping[str, object], read: Callable[[Any], Result]) -> Result:
        """Send a JSON object and return what is read in the JSON that comes back.

        Args:
            path: behind the address.
            body: the object.
            read: turns the answer into what is wanted; a MalformedError of it is worth another attempt.

        Raises:
            RefusedError: this request is refused, or was not answered in all attempts.
            GlmtuneError: the server would refuse any other request too, or cannot be reached any more.
        """
        return await self._send("POST", path, json.dumps(body).encode(), read)

    async def _send(
        self, method: str, path: str, data: bytes | None, read: Callable[[Any], Result]
    ) -> Result:
        num_attempts = 0
        while True:
            try:
                return read(await self._attempt(method, self._address.url(path), data))
            except Problem as caught:
                problem = caught
            except MalformedError as error:
                problem = Problem(self._clean(str(error)), retries=ODD_RETRIES)
            except RefusedError as error:
                raise RefusedError(self._address.without_secrets(str(error))) from None
            num_attempts += 1
            # What cannot be reached at the start is a wrong address more often than a server about to come.
            retries = 0 if method == "GET" and problem.is_general else problem.retries
            if num_attempts <= min(retries, self._patience.max_retries):
                await self._pause(path, num_attempts - 1, problem)
                if not self._is_ending.is_set():
                    continue
            raise self._final(problem, path, num_attempts, is_page=method == "GET")

    def _final(self, problem: Problem, path: str, num_attempts: int, *, is_page: bool) -> GlmtuneError:
        where = f"{self._address.shown}/{path}"
        tried = f" in {num_attempts} attempts, the last time" if num_attempts > 1 else ""
        text = f"{where} gave no answer{tried}: {problem.text.rstrip('.')}."
        if is_page and problem.status and problem.status not in (*BUSY, *NOT_ALLOWED):
            return NotServedError(f"{text} {problem.hint}".rstrip())
        if not problem.is_general:
            return RefusedError(f"{text} {problem.hint}".rstrip())
        hint = problem.hint or "Start the server or wait, then run the same command again."
        return GlmtuneError(f"{text} {hint} Answers so far are kept.")

    async def _pause(self, path: str, num_pauses: int, problem: Problem) -> None:
        # By chance up to half as long again: else all requests that were refused together would return
        # together.
        seconds = self._patience.first_wait_seconds * 2 ** min(num_pauses, 20) * random.uniform(1, 1.5)
        seconds = min(max(seconds, problem.asked_wait), LONGEST_WAIT_SECONDS)
        where = f"{self._address.shown}/{path}"
        LOGGER.warning("%s: %s; next attempt in %.1f s.", where, problem.text, seconds)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_ending.wait(), seconds)

    async def _attempt(self, method: str, url: str, data: bytes | None) -> Any:
        """Return the content of one answer.

        Raises:
            Problem: there is none.
        """
        most = self._patience.max_retries
        try:
            async with asyncio.timeout(self._patience.timeout_seconds):
                return await self._exchange(method, url, data)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            if is_about_certificates(error):
                hint = "Use a certificate that this machine trusts (SSL_CERT_FILE names others)."
                raise Problem(self._clean(str(error)), is_general=True, hint=hint) from None
            text = f"it cannot be reached ({self._clean(system_error(error))})"
            hint = "Check `endpoint.base_url`, or start the server, then run the same command again."
            raise Problem(text, retries=most, is_general=True, hint=hint) from None
        except (TimeoutError, httpx2.TimeoutException):
            seconds = f"{self._patience.timeout_seconds:g}"
            text = f"no whole answer came within {seconds} seconds (`endpoint.timeout_seconds`)"
            raise Problem(text, retries=ODD_RETRIES) from None
        except (httpx2.DecodingError, ImportError):  # the latter: an encoding without its package
            raise Problem("its answer cannot be unpacked", retries=ODD_RETRIES) from None
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.InvalidURL):
            text = "no request can be made of this address and key"
            raise Problem(text, is_general=True, hint=HINTS[404]) from None
        except (httpx2.TransportError, OSError) as error:
            text = f"the connection broke ({self._clean(system_error(error))})"
            raise Problem(text, retries=most) from None

    async def _exchange(self, method: str, url: str, data: bytes | None) -> Any:
        for _ in range(MAX_REDIRECTS + 1):
            async with self._http.stream(method, url, content=data) as reply:
                self.date = reply.headers.get("date")
                target = reply.headers.get("location") if 300 <= reply.status_code < 400 else None
                if target is None:
                    return self._content(method, reply, await read_body(reply))
                url = self._redirected(url, target)
        text = f"it redirects more than {MAX_REDIRECTS} times"
        raise Problem(text, is_general=True, hint=HINTS[404])

    def _redirected(self, url: str, target: str) -> str:
        """Return where a redirect leads, which must be the same server: what is sent holds the key."""
        try:
            new = httpx2.URL(url).join(target)
        except (httpx2.InvalidURL, ValueError):
            raise Problem("it redirects to no address", is_general=True, hint=HINTS[404]) from None
        if self._address.has_origin(new.scheme, new.host, new.port) and not new.userinfo:
            return str(new)
        raise Problem(
            f"it redirects to {shown(f'{new.scheme}://{new.netloc.decode()}')}, another host, port or scheme"
            f" than {self._address.origin}, where the key and the questions may not go",
            is_general=True,
            hint="If that is the server meant, name it in `endpoint.base_url`.",
        )

    def _content(self, method: str, reply: httpx2.Response, data: bytes) -> Any:
        """Return the JSON of an answer, or raise the Problem that it tells of."""
        try:
            content, fault = parse_json(data), ""
        except ValueError as error:
            content, fault = None, str(error)
        status = reply.status_code
        if 200 <= status < 300 and not fault:
            status = status_inside(content)
            if status == 200:
                return content
        if 200 <= status < 300:
            start = self._clean(data[:120].decode("utf-8", "replace"))
            text = f"its answer is no JSON ({fault}): {start!r}"
            raise Problem(
                text,
                retries=ODD_RETRIES,
                hint="Check `endpoint.base_url`, or see the server's log.",
                status=status,
            )
        said = error_message(content) if content is not None else data[:1000].decode("utf-8", "replace")
        text = f"HTTP {status}: {self._clean(said or reply.reason_phrase) or 'no reason given'}"
        if status in BUSY:
            wait = seconds_asked(reply.headers.get("retry-after"), reply.headers.get("date"))
            raise Problem(text, retries=self._patience.max_retries, asked_wait=wait)
        # A 403 may come of the words of one question, by a filter in front of the server.
        is_general = status in HINTS and (status != 403 or method == "GET")
        hint = HINTS.get(status, "See the server's log.")
        raise Problem(text, is_general=is_general, hint=hint, status=status)

    def _clean(self, text: str) -> str:
        """Return what a server says in at most 300 characters, without our secrets."""
        return shown(self._address.without_secrets(text))
