"""Answers of a running server with OpenAI's interface: `glmtune serve`, or any other.

Requests run in an event loop in a thread of its own, so that an answer can be cancelled at any point: before
the first byte as well, when a server still reads the prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2

from glmtune.errors import ConfigError, GlmtuneError, unknown_name
from glmtune.http_client.connection import certificates, is_about_certificates, system_error
from glmtune.http_client.replies import error_message, parse_json
from glmtune.http_client.server_address import ServerAddress, environment_proxy, read_address, shown
from glmtune.inference.requests.chat import Finished
from glmtune.interactive.answerer import AdapterChoice, AnswerStream, SamplingChoice, chosen_fields
from glmtune.interactive.chunks import ChunkReader
from glmtune.interactive.sse import MAX_EVENT_BYTES, event_data

KEY_VARIABLES = ("GLMTUNE_API_KEY", "OPENAI_API_KEY")
CONNECT_SECONDS = 10.0
LIST_SECONDS = 30.0
SILENCE_SECONDS = 600.0
"""How long nothing may come: a long prompt is read first, and some servers send nothing meanwhile."""
MAX_LIST_BYTES = 4 * 2**20
FIELD_NAMES = {"max_new_tokens": "max_tokens"}
"""Fields of `Sampling` that OpenAI's interface calls otherwise; the rest has its own names."""
NOT_SENT = ("ignore_eos", "logprobs", "prompt_logprobs")


class RemoteAnswerer:
    """Answers by a server (see `Answerer`).

    Attributes:
        model_name: the base that is asked.
        first_adapter: what was named as the model, where that is a prefix or LoRA of the base.
    """

    knows_tools = True  # it says itself where it knows none
    sampling_defaults = None

    def __init__(self, url: str, *, model: str = "") -> None:
        """Ask the server what it serves.

        Args:
            url: its address, with or without ``/v1``.
            model: the model to ask; empty: the first it lists.

        Raises:
            ConfigError: it is no address, or the server does not know the model.
            GlmtuneError: it cannot be reached, refuses the key, or names no model.
        """
        self._address = server_address(url)
        # The client's own INFO lines show whole addresses, and keys may stand in those.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="glmtune-remote", daemon=True)
        self._thread.start()
        self._running: set[asyncio.Task[None]] = set()
        # The environment's proxies are read by `environment_proxy` alone, which shows none of them a key.
        self._http = httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity", **self._address.headers},
            timeout=httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            trust_env=False,
            verify=certificates(),
            proxy=environment_proxy(self._address),
        )
        try:
            listed = asyncio.run_coroutine_threadsafe(self._list(), self._loop).result()
            self.model_name, self._adapters, self.first_adapter = self._choose(listed, model)
        except BaseException:
            self.close()
            raise

    @property
    def place(self) -> str:
        """The server's address, without what is secret in it."""
        return self._address.shown

    @property
    def adapters(self) -> Sequence[AdapterChoice]:
        """What the server lists beside its base."""
        return self._adapters

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        sampling: SamplingChoice,
        adapter: str = "",
        strength: float = 1.0,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> AnswerStream:
        """Ask for an answer; see `Answerer`. Only what the user chose is sent; the rest is the server's."""
        chosen = chosen_fields(sampling)
        body: dict[str, Any] = {
            "model": adapter or self.model_name,
            "messages": [dict(message) for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {FIELD_NAMES.get(name, name): value for name, value in chosen.items() if name not in NOT_SENT}
        if strength != 1.0:
            kinds = {each.name: each.kind for each in self._adapters}
            body["adapter_scale" if kinds.get(adapter) == "lora" else "prefix_strength"] = strength
        if tools:
            body["tools"] = [
                tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
            ]
        stream = AnswerStream()
        future = asyncio.run_coroutine_threadsafe(self._answer(body, stream), self._loop)
        stream.cancel = future.cancel
        return stream

    def close(self) -> None:
        """Cancel what runs and close the connections."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()

    async def _close(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._http.aclose()

    # What the server has.

    async def _list(self) -> list[Mapping[str, Any]] | None:
        """Return the models that the server lists; None where it has no list."""
        try:
            async with asyncio.timeout(LIST_SECONDS):
                async with self._http.stream("GET", self._address.url("models")) as reply:
                    if reply.status_code in (404, 405, 501):
                        return None
                    content = await self._content(reply, MAX_LIST_BYTES)
        except TimeoutError:
            raise GlmtuneError(
                f"{self.place} gave no list of models within {LIST_SECONDS:g} seconds. Look whether it is"
                " busy or still loads, and try again."
            ) from None
        except httpx2.HTTPError as error:
            raise self._broken(error) from None
        data = content.get("data") if isinstance(content, dict) else None
        entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
        return [entry for entry in entries if isinstance(entry.get("id"), str)]

    def _choose(
        self, listed: list[Mapping[str, Any]] | None, model: str
    ) -> tuple[str, tuple[AdapterChoice, ...], str]:
        """Return the base to ask, what may be put on it, and what of that was named as the model."""
        if not listed:
            if model:
                return model, (), ""
            raise GlmtuneError(f"{self.place} lists no models. Name one: `url_model=NAME`.")
        names = [entry["id"] for entry in listed]
        if model and model not in names:
            raise ConfigError(unknown_name("`url_model`", shown(model), map(shown, names)))
        bases = [entry["id"] for entry in listed if not entry.get("parent")]
        chosen = model or (bases or names)[0]
        parent = next((entry.get("parent") for entry in listed if entry["id"] == chosen), None)
        is_adapter = isinstance(parent, str) and parent in names and parent != chosen
        base = str(parent) if is_adapter else chosen
        adapters = tuple(
            AdapterChoice(entry["id"], str(entry.get("kind") or ""))
            for entry in listed
            if entry.get("parent") == base != entry["id"]
        )
        return base, adapters, chosen if is_adapter else ""

    # One answer.

    async def _answer(self, body: Mapping[str, Any], stream: AnswerStream) -> None:
        """Send a question and put the events of its answer, or what went wrong, into the stream."""
        task = asyncio.current_task()
        assert task is not None, "it runs in the loop"
        self._running.add(task)
        reader = ChunkReader()
        try:
            await self._exchange(body, reader, stream)
        except asyncio.CancelledError:
            stream.put(Finished("cancelled", 0, 0))
            raise
        except GlmtuneError as error:
            stream.put(error)
        except httpx2.HTTPError as error:
            stream.put(self._broken(error))
        except Exception as error:  # whatever it is, the reader waits for a word
            stream.put(GlmtuneError(f"{self.place}: {self._clean(f'{type(error).__name__}: {error}')}"))
        finally:
            self._running.discard(task)

    async def _exchange(self, body: Mapping[str, Any], reader: ChunkReader, stream: AnswerStream) -> None:
        url = self._address.url("chat/completions")
        async with self._http.stream("POST", url, json=body) as reply:
            kind = reply.headers.get("content-type", "")
            if reply.status_code != 200 or "text/event-stream" not in kind:
                content = await self._content(reply, MAX_EVENT_BYTES)
                for event in reader.whole(self._without_error(content)):
                    stream.put(event)
                return
            try:
                async for data in event_data(reply.aiter_bytes()):
                    if data.strip() == b"[DONE]":
                        reader.has_ended = True
                        break
                    for event in reader.chunk(self._without_error(parse_json(data))):
                        stream.put(event)
            except ValueError as error:
                raise GlmtuneError(
                    f"{self.place} sent what is no answer ({self._clean(str(error))}). What came before is"
                    " kept."
                ) from None
        if not reader.has_ended:
            raise GlmtuneError(
                f"{self.place} ended in the middle of its answer. What came is kept; /retry asks again."
            )
        stream.put(reader.finished())

    # What goes wrong.

    async def _content(self, reply: httpx2.Response, limit: int) -> Any:
        """Return the JSON of an answer in one piece.

        Raises:
            GlmtuneError: it is a refusal, too long, or no JSON.
        """
        data = bytearray()
        async for chunk in reply.aiter_bytes():
            data += chunk
            if len(data) > limit:
                raise GlmtuneError(f"{self.place} sent more than {limit:,} bytes at once, the limit.")
        try:
            content = parse_json(bytes(data))
        except ValueError as error:
            content = None
            if reply.status_code == 200:
                raise GlmtuneError(
                    f"{self.place} answered with what is no JSON ({error}). Check `url`: it is the address up"
                    " to and with /v1."
                ) from None
        if reply.status_code == 200:
            return content
        said = error_message(content) if content is not None else ""
        raise self._refused(reply, self._clean(said or reply.reason_phrase))

    def _refused(self, reply: httpx2.Response, said: str) -> GlmtuneError:
        status = reply.status_code
        keys = " or ".join(KEY_VARIABLES)
        hints = {
            401: f"Put the server's key into the environment variable {keys}.",
            403: f"Put a key that may do this into the environment variable {keys}.",
            404: "Check `url` (the address up to and with /v1) and `url_model`.",
            429: "It is busy: ask again in a moment.",
            503: "It is busy, loads or shuts down: ask again in a moment.",
        }
        if 300 <= status < 400:
            target = self._clean(reply.headers.get("location", "nowhere"))
            return GlmtuneError(
                f"{self.place} redirects to {target}, where key and messages are not sent unasked. If that is"
                " the server meant, name it in `url`."
            )
        hint = hints.get(status, "See the server's log." if status >= 500 else "")
        return GlmtuneError(f"{self.place} refused (HTTP {status}): {said.rstrip('.')}. {hint}".rstrip())

    def _broken(self, error: httpx2.HTTPError) -> GlmtuneError:
        if isinstance(error, httpx2.ReadTimeout):
            return GlmtuneError(
                f"{self.place} sent nothing for {SILENCE_SECONDS:g} seconds. What came is kept."
            )
        said = self._clean(system_error(error))
        if is_about_certificates(error):
            way_out = "Use a certificate that this machine trusts (SSL_CERT_FILE names others)."
            return GlmtuneError(f"{self.place} cannot be trusted ({said}). {way_out}")
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            way_out = "Start it (`glmtune serve`), or correct `url`."
            return GlmtuneError(f"{self.place} cannot be reached ({said}). {way_out}")
        return GlmtuneError(
            f"The connection to {self.place} broke ({said}). What came is kept; /retry asks again."
        )

    def _without_error(self, content: Any) -> Any:
        """Return content unless it tells of an error, as gateways and streams do under status 200."""
        if isinstance(content, dict) and content.get("error"):
            raise GlmtuneError(f"{self.place} failed: {self._clean(error_message(content))}")
        return content

    def _clean(self, text: str) -> str:
        return shown(self._address.without_secrets(text))


def server_address(url: str) -> ServerAddress:
    """Take an address apart as people write it: without scheme, without ``/v1``, with a route behind."""
    given = url.strip() if "://" in url else f"http://{url.strip()}"
    variable = next((name for name in KEY_VARIABLES if os.environ.get(name, "").strip()), "")
    read_address(given, setting="url")
    parts = urlsplit(given)
    path = parts.path.rstrip("/")
    for route in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(route)
    whole = parts._replace(path=path or "/v1", fragment="").geturl()
    return read_address(whole, api_key_env=variable, setting="url")
