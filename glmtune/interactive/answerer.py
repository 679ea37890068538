"""What answers a conversation: a model in this process, or a server by its address."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from glmtune.errors import GlmtuneError
from glmtune.inference.requests.chat import AnswerEvent, ChatEngine, Finished
from glmtune.inference.requests.sampling import Sampling

POLL_SECONDS = 0.2
"""How often a waiting reader looks up: on Windows a wait without end is deaf to Ctrl-C."""

SamplingChoice = Sampling | Mapping[str, Any]
"""All that decides the sampling, or only the fields that the user chose: the rest is the answerer's."""


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """A prefix or LoRA to choose; ``kind`` is ``prefix`` or ``lora``, empty where a server does not say."""

    name: str
    kind: str

    @property
    def has_strength(self) -> bool:
        """Whether it is known how it can count more or less than as it was tuned."""
        return self.kind in ("prefix", "lora")


class AnswerStream:
    """The events of one answer as they come; leaving the loop over them cancels it.

    ``put`` and ``stop`` may be called from any thread and from a signal's handler.
    """

    def __init__(self, cancel: Callable[[], object] = lambda: None) -> None:
        """Begin empty.

        Args:
            cancel: tells whoever writes the answer that nobody reads it any more.
        """
        self.cancel = cancel
        self._events: queue.SimpleQueue[AnswerEvent | GlmtuneError] = queue.SimpleQueue()

    def put(self, event: AnswerEvent | GlmtuneError) -> None:
        """Hand over an event, or the error that ended the answer."""
        self._events.put(event)

    def stop(self) -> None:
        """Let the reader go at once, after what came so far; what was being written is cancelled."""
        self._events.put(Finished("cancelled", 0, 0))

    def __iter__(self) -> Generator[AnswerEvent]:
        """Yield the events, `Finished` last.

        Raises:
            GlmtuneError: the answer failed; what was yielded before stands.
        """
        is_over = False
        try:
            while not is_over:
                event = self._next()
                if isinstance(event, GlmtuneError):
                    is_over = True
                    raise event
                if isinstance(event, Finished) and event.reason == "failed":
                    is_over = True
                    raise GlmtuneError(event.error)
                # `stop` puts its event in without telling the engine, as a signal's handler must not wait for
                # the engine's lock: the reader tells it, below.
                is_over = isinstance(event, Finished) and event.reason != "cancelled"
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            if not is_over:
                self.cancel()

    def _next(self) -> AnswerEvent | GlmtuneError:
        while True:
            try:
                return self._events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue


class Answerer(Protocol):
    """Answers conversations, one or several at once."""

    @property
    def model_name(self) -> str:
        """The base model, as shown to the user."""
        ...

    @property
    def adapters(self) -> Sequence[AdapterChoice]:
        """What may be put on the base."""
        ...

    @property
    def sampling_defaults(self) -> Sampling | None:
        """What holds where the user says nothing; None: a server decides, and does not say."""
        ...

    @property
    def knows_tools(self) -> bool:
        """Whether tools can be offered."""
        ...

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        sampling: SamplingChoice,
        adapter: str = "",
        strength: float = 1.0,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> AnswerStream:
        """Ask for an answer.

        Args:
            messages: in OpenAI's form, oldest first.
            sampling: see `SamplingChoice`.
            adapter: name of a prefix or LoRA; empty: the base.
            strength: of a prefix, or scale of a LoRA.
            tools: their descriptions, in OpenAI's form or bare.

        Raises:
            GlmtuneError: the conversation cannot be asked, in the user's words.
        """
        ...

    def close(self) -> None:
        """Let go of the model or the connection."""
        ...


class LocalAnswerer:
    """Answers with an engine in this process (see `Answerer`)."""

    def __init__(self, chat: ChatEngine, model_name: str) -> None:
        """Start the engine."""
        self._chat, self.model_name = chat, model_name
        self._engine: Any = chat.engine
        self._engine.start()

    @property
    def adapters(self) -> Sequence[AdapterChoice]:
        """What may be put on the base."""
        return [AdapterChoice(info.name, info.kind) for info in self._engine.adapters]

    @property
    def sampling_defaults(self) -> Sampling:
        """What the release does where the user says nothing."""
        return self._chat.sampling_defaults

    @property
    def knows_tools(self) -> bool:
        """Whether the release knows tools."""
        return self._chat.template.knows_tools

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        sampling: SamplingChoice,
        adapter: str = "",
        strength: float = 1.0,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> AnswerStream:
        """Ask for an answer; see `Answerer`."""
        chosen = (
            sampling if isinstance(sampling, Sampling) else replace(self.sampling_defaults, **dict(sampling))
        )
        stream = AnswerStream()
        answer = self._chat.answer(
            messages,
            tools=tools,
            sampling=chosen,
            adapter=adapter,
            strength=strength,
            on_event=stream.put,
        )
        stream.cancel = answer.cancel
        return stream

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()


def chosen_fields(sampling: SamplingChoice) -> dict[str, Any]:
    """Return the fields that were chosen: all of a `Sampling` that are not neutral, temperature and top_p."""
    if not isinstance(sampling, Sampling):
        return dict(sampling)
    neutral = asdict(Sampling())
    always = ("temperature", "top_p")
    return {
        name: value for name, value in asdict(sampling).items() if name in always or value != neutral[name]
    }
