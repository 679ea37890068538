"""JSON over HTTP with retries: what a request costs when a server is busy, and what its refusals mean.

By hand on ``urllib``: written with the client that huggingface-hub brings along, this file had as many lines
and answered no more requests per second. What it is about (which answers are worth another try, how long to
wait, what a refusal means for the settings) is left to its caller by every client. huggingface-hub's own
``http_backoff`` raises errors of the Hub, waits without a limit where a server asks for it, and does not
retry half an answer; and that client has changed its name from one major version to the next.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from glmtune.errors import GlmtuneError

LOGGER = logging.getLogger(__name__)

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Answers after which the same request may succeed later."""
LONGEST_WAIT_SECONDS = 60.0
HINTS = {
    401: "Set the key in the environment variable that `endpoint.api_key_env` names.",
    403: "Set a key that may use this model in the variable that `endpoint.api_key_env` names.",
    404: "Check `endpoint.base_url` (it ends before /chat/completions) and `endpoint.model`.",
}


class JsonClient:
    """Sends requests to one server; safe to use from several threads."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str,
        timeout_seconds: float,
        max_retries: int,
        first_wait_seconds: float,
    ) -> None:
        """Keep the address; nothing is sent yet.

        Args:
            base_url: such as ``http://localhost:8000/v1``.
            api_key: sent as bearer token unless empty.
            timeout_seconds: per request.
            max_retries: further attempts while the server is busy or cannot be reached.
            first_wait_seconds: pause before the first of them; it doubles each time, with some chance in it.
        """
        self._base_url = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_seconds, self._max_retries = timeout_seconds, max_retries
        self._first_wait_seconds = first_wait_seconds

    def get(self, path: str) -> Any:
        """Return the JSON at a path; raises as `post`."""
        return self._send(path, None)

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """Send a JSON object and return the JSON that comes back.

        Raises:
            GlmtuneError: the server refused the request, or stayed busy or out of reach through all retries.
        """
        return self._send(path, json.dumps(body).encode())

    def _send(self, path: str, data: bytes | None) -> Any:
        url = f"{self._base_url}/{path}"
        problem = ""
        for attempt in range(self._max_retries + 1):
            asked_wait = None
            try:
                request = urllib.request.Request(url, data=data, headers=self._headers)
                with urllib.request.urlopen(request, timeout=self._timeout_seconds) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {_message(error)}"
                if error.code not in BUSY:
                    raise GlmtuneError(
                        f"{url} refused a request, {problem}. {HINTS.get(error.code, 'See its log.')}"
                        " Refused questions are not scored; answers so far are kept."
                    ) from None
                asked_wait = error.headers.get("Retry-After")
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:  # half an answer, or the error page of a proxy
                problem = f"its answer is no JSON ({error})"
            if attempt < self._max_retries:
                self._pause(url, attempt, asked_wait, problem)
        raise GlmtuneError(
            f"{url} gave no answer in {self._max_retries + 1} attempts, the last time: {problem}. Start the"
            " server or wait, then run the same command again; answers so far are kept."
        )

    def _pause(self, url: str, attempt: int, asked_wait: str | None, problem: str) -> None:
        # By chance up to half as long again: else all requests that were refused together would return
        # together.
        seconds = self._first_wait_seconds * 2**attempt * random.uniform(1, 1.5)
        if asked_wait is not None and asked_wait.replace(".", "", 1).isdigit():
            seconds = max(seconds, float(asked_wait))
        seconds = min(seconds, LONGEST_WAIT_SECONDS)
        LOGGER.warning("%s: %s; next attempt in %.1f s.", url, problem, seconds)
        time.sleep(seconds)


def _message(error: urllib.error.HTTPError) -> str:
    """Return what a server says about its refusal, in at most 300 characters."""
    text = error.read().decode("utf-8", "replace")
    try:
        content = json.loads(text)
        inner = content.get("error", content)
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError):
        pass
    return text.strip()[:300] or str(error.reason)
