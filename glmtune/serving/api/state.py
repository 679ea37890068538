"""What the routes share: the engine once it is there, the names it is asked by, and what holds by default."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from glmtune.inference.requests.chat import ChatEngine, Submits
from glmtune.inference.requests.engine_state import AdapterInfo, EngineStats
from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.reading import RequestReader
from glmtune.serving.api.replies.tokens import TokenTexts


class ServedEngine(Submits, Protocol):
    """What the routes need of an engine."""

    @property
    def max_context_tokens(self) -> int:
        """Most tokens of a prompt and its answer."""
        ...

    @property
    def adapters(self) -> Sequence[AdapterInfo]:
        """The prefixes and LoRAs it holds now."""
        ...

    def stats(self) -> EngineStats:
        """Return what it does now, and how often switches were on and off."""
        ...


@dataclass(frozen=True, slots=True)
class RouteLimits:
    """How much one request may ask for, and how its stream is kept open.

    Attributes:
        max_choices: most answers to one request: prompts times ``n``.
        keep_alive_seconds: a stream without news gets a comment so often, so that proxies keep it.
    """

    max_choices: int = 128
    keep_alive_seconds: float = 15.0


@dataclass(frozen=True, slots=True)
class AnsweredRequest:
    """What became of a request, for logs and metrics; it holds no text.

    Attributes:
        path: the route.
        model: the name asked for.
        is_stream: whether the answer was streamed.
        num_choices: answers asked for.
        num_prompt_tokens: of all its prompts.
        num_cached_tokens: how many of these were not read again.
        num_new_tokens: of all its answers.
        finish_reasons: of the answers that ended; a client that went away leaves ``cancelled``.
        first_seconds: from its submission to the first piece of an answer; None: none came.
        seconds: from its submission to the end.
    """

    path: str
    model: str
    is_stream: bool
    num_choices: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int
    finish_reasons: tuple[str, ...]
    first_seconds: float | None
    seconds: float


@dataclass(slots=True)
class ServingState:
    """What the routes share; whoever runs the server changes it while the routes read it.

    Attributes:
        names: of the base model, at least one; the first is the parent of its adapters.
        chat: what answers; None while it loads. Set it once its engine is started.
        is_draining: no new requests are taken.
        default_model: asked where a request names none, and by ``POST /``; None: the base.
        max_tokens: most tokens of an answer where a request gives no number; None: what the context leaves.
        is_strict: refuse unknown fields.
        limits: of one request.
        fingerprint: names what answers: another one may answer otherwise.
        created: when the server began, in seconds since 1970.
        on_answered: told of every request that reached the engine, in the event loop.
        reader: reads what is asked, beside the event loop.
    """

    names: tuple[str, ...]
    chat: ChatEngine | None = None
    is_draining: bool = False
    default_model: str | None = None
    max_tokens: int | None = None
    is_strict: bool = False
    limits: RouteLimits = field(default_factory=RouteLimits)
    fingerprint: str = field(default_factory=lambda: f"fp_{secrets.token_hex(5)}")
    created: int = field(default_factory=lambda: int(time.time()))
    on_answered: Callable[[AnsweredRequest], None] | None = None
    reader: RequestReader = field(default_factory=RequestReader)
    _token_texts: TokenTexts | None = None

    def ready(self) -> ChatEngine:
        """Return what answers.

        Raises:
            ApiError: it is not there yet, or takes no more requests.
        """
        if self.is_draining:
            raise ApiError("The server stops and takes no more requests.", status=503, code="stopping",
                           headers={"Retry-After": "10"})  # fmt: skip
        if self.chat is None:
            raise ApiError("The model is still loading. Ask again soon; /health says when it is ready.",
                           status=503, code="loading", headers={"Retry-After": "5"})  # fmt: skip
        return self.chat

    @property
    def engine(self) -> ServedEngine:
        """The engine behind `chat`.

        Raises:
            ApiError: see `ready`.
        """
        return cast("ServedEngine", self.ready().engine)

    @property
    def token_texts(self) -> TokenTexts:
        """The texts of single tokens."""
        chat = self.ready()
        if self._token_texts is None:
            self._token_texts = TokenTexts(chat.tokenizer)
        return self._token_texts
