"""Doubles of the engine: one that writes given tokens, and conversations that are answered by given events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from glmtune.errors import ConfigError
from glmtune.inference.requests.chat import AnswerEvent, ChatEngine, Finished
from glmtune.inference.requests.engine_state import AdapterInfo
from glmtune.inference.requests.generation import Generation
from glmtune.inference.requests.request import Piece, Request, TokenLogprob


def logprob_of(token: int) -> float:
    """A log-probability that tells which token it is of."""
    return -(token % 7) / 8 - 0.125


class ScriptedEngine:
    """Writes the tokens of a script whatever it is asked, each request in a thread of its own.

    Attributes:
        requests: what was asked.
        generations: the handles of these.
        paused: cleared, no token is written until it is set.
        cancelled: how many requests were cancelled.
    """

    def __init__(self, script: Sequence[int], *, end: int | None = None, context: int = 4096) -> None:
        self.script, self.end, self.max_context_tokens = tuple(script), end, context
        self.requests: list[Request] = []
        self.generations: list[Generation] = []
        self.adapters: tuple[AdapterInfo, ...] = ()
        self.paused = threading.Event()
        self.paused.set()
        self.num_running = self.cancelled = self.num_written = 0
        self.most_tokens: int | None = None

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Generation:
        if self.most_tokens is not None and len(request.prompt_ids) > self.most_tokens:
            raise ConfigError(
                f"The prompt may come to hold {len(request.prompt_ids)} tokens, but the cache holds {self.most_tokens}."
            )
        gone = threading.Event()
        generation = Generation(request, cancel=lambda _: gone.set(), on_piece=on_piece)
        self.requests.append(request)
        self.generations.append(generation)
        self.num_running += 1
        threading.Thread(target=self._write, args=(generation, gone), daemon=True).start()
        return generation

    def _write(self, generation: Generation, gone: threading.Event) -> None:
        time.sleep(0.005)  # an engine answers no sooner than `submit` returns
        request = generation.request
        sampling = request.sampling
        stream = request.text_stream() if request.text_stream else None
        generation.num_cached_tokens = 3
        if sampling.prompt_logprobs is not None:
            generation.prompt_logprobs = tuple(
                TokenLogprob(
                    token,
                    None if place == 0 else logprob_of(token),
                    () if place == 0 else self._top(token, sampling.prompt_logprobs),
                )
                for place, token in enumerate(request.prompt_ids)
            )
        reason: Any = "eos" if self.end is not None else "length"
        script = [*self.script] + ([self.end] if self.end is not None else [])
        limit = sampling.max_new_tokens or self.max_context_tokens - len(request.prompt_ids)
        for number, token in enumerate(script):
            while not self.paused.wait(0.01) and not gone.is_set():
                pass
            if gone.is_set():
                self.cancelled += 1
                reason = "cancelled"
                break
            if token == self.end and token in request.stop_ids and not sampling.ignore_eos:
                reason = "eos"
                break
            self.num_written += 1
            told = (
                (TokenLogprob(token, logprob_of(token), self._top(token, sampling.logprobs)),)
                if sampling.logprobs is not None
                else ()
            )
            text = stream.feed(token) if stream else ""
            generation.put(Piece(text, (token,), told))
            if stream and stream.is_stopped:
                reason = "stop"
                break
            if number + 1 >= limit:
                reason = "length"
                break
        self.num_running -= 1
        generation.put(Piece(stream.finish() if stream else "", finish_reason=reason))

    def _top(self, token: int, count: int) -> tuple[tuple[int, float], ...]:
        return tuple((token + place, logprob_of(token) - place) for place in range(count))


class _Handle:
    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel


class ScriptedChat(ChatEngine):
    """Answers every conversation with given events; the prompt is rendered and encoded as always.

    Attributes:
        asked: the arguments of every submission.
    """

    def __init__(self, engine: ScriptedEngine, tokenizer: Any, answer: Sequence[AnswerEvent]) -> None:
        super().__init__(engine, tokenizer)
        self.answer_events, self.asked, self.num_cancelled = tuple(answer), [], 0

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        on_event: Callable[[AnswerEvent], None] | None = None,
        **options: Any,
    ) -> Any:
        self.asked.append((tuple(prompt_ids), options))
        gone = threading.Event()

        def write() -> None:
            assert on_event is not None
            for event in self.answer_events:
                on_event(event)
            if not isinstance(self.answer_events[-1], Finished):  # it goes on until it is cancelled
                gone.wait(10)
                self.num_cancelled += 1
                on_event(Finished("cancelled", len(prompt_ids), 5))

        threading.Thread(target=write, daemon=True).start()
        return _Handle(gone.set)
