"""Conversations asked of the engine: messages in, the events of an answer out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from transformers import PreTrainedTokenizerBase

from glmtune.errors import DataError
from glmtune.inference.requests.answer_events import (
    AnswerEvent,
    CallDelta,
    CallStart,
    Finished,
    TextDelta,
    ThoughtDelta,
)
from glmtune.inference.requests.answer_reader import AnswerReader, Delta
from glmtune.inference.requests.generation import Generation
from glmtune.inference.requests.request import Piece, Request, TokenLogprob
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.requests.text_stream import chat_text
from glmtune.messages import Message
from glmtune.models.chat.defaults import CHAT_DEFAULTS
from glmtune.models.releases.families import Family
from glmtune.models.templates.base import Template, TextTokenizer
from glmtune.models.templates.chat_messages import THOUGHTS_KEY, chat_messages, encode_chat
from glmtune.models.templates.folder import FolderTemplate
from glmtune.models.templates.renderer import template_for
from glmtune.models.templates.responses import process_response

__all__ = [
    "Answer",
    "AnswerEvent",
    "CallDelta",
    "CallStart",
    "ChatEngine",
    "Finished",
    "Submits",
    "TextDelta",
    "ThoughtDelta",
    "with_limits",
]


class Submits(Protocol):
    """What a conversation needs of an engine."""

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Generation:
        """Ask for a continuation."""
        ...


class ChatEngine:
    """An engine that is asked in messages, by the template of its release.

    Attributes:
        engine: continues prompts.
        tokenizer: of its model.
    """

    def __init__(self, engine: Submits, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a running engine and the tokenizer of its model."""
        self.engine, self.tokenizer = engine, tokenizer

    @property
    def template(self) -> Template:
        """The prompt rules of the release."""
        return template_for(cast("TextTokenizer", self.tokenizer))

    @property
    def sampling_defaults(self) -> Sampling:
        """What holds where a caller says nothing: the release's own ``temperature`` and ``top_p``."""
        defaults = CHAT_DEFAULTS[cast("TextTokenizer", self.tokenizer).family]
        return Sampling(temperature=defaults.temperature, top_p=defaults.top_p)

    def prompt_ids(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        continues: bool = False,
        call: str = "",
    ) -> tuple[int, ...]:
        """Return the prompt of a conversation.

        Args:
            messages: oldest first; dictionaries in OpenAI's form or the release's.
            tools: their descriptions, in OpenAI's form or bare. Without a system message in front, one with
                the release's own words introduces them.
            continues: go on with the last message, which is the assistant's, instead of answering it.
            call: name of a tool that the answer has to call: its name is written in front.

        Raises:
            DataError: the template cannot show the conversation, with the place and the way out.
        """
        tokenizer, template = cast("TextTokenizer", self.tokenizer), self.template
        given = list(messages)
        if tools and template.knows_tools and (not given or _role(given[0]) != "system"):
            given = [Message("system", template.tools_introduction), *given]
        asked = chat_messages(tokenizer, given, *([list(tools)] if tools else []))
        if continues:
            if call or not asked or asked[-1].role != "assistant" or asked[-1].metadata:
                last = f"has the role `{asked[-1].role}`" if asked else "is missing"
                raise DataError(
                    f"`continues` goes on with a text of the assistant, but the last message {last}, or"
                    " a tool is called. End with a text of the assistant, or leave `continues` out."
                )
            return tuple(encode_chat(tokenizer, asked, continue_final=True).input_ids)
        if call and not template.knows_tools:
            raise DataError(
                f"`call` is `{call}`, but template `{template.name}` knows no tools. Leave it out."
            )
        ids = template.encode_prompt(tokenizer, asked)
        if call and isinstance(template, FolderTemplate):
            return (*ids, *template.call_opening(tokenizer, call))
        return (*ids, *tokenizer.text_ids(f"{call}\n")) if call else tuple(ids)

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: Sampling | None = None,
        adapter: str = "",
        strength: float = 1.0,
        has_tools: bool = False,
        continues: bool = False,
        call: str = "",
        on_event: Callable[[AnswerEvent], None] | None = None,
    ) -> Answer:
        """Ask for an answer.

        Args:
            prompt_ids: from `prompt_ids`.
            sampling: how tokens are chosen; None: `sampling_defaults`.
            adapter: see `Request`.
            strength: see `Request`.
            has_tools: tools were announced, so that the answer may call one.
            continues: as the prompt was made.
            call: as the prompt was made.
            on_event: called with every event in the engine's thread, instead of keeping them for iteration.

        Raises:
            ConfigError: it can never fit; see `Engine.submit`.
        """
        chosen = sampling or self.sampling_defaults
        tokenizer = cast("TextTokenizer", self.tokenizer)
        request = Request(
            prompt_ids=tuple(prompt_ids),
            sampling=chosen,
            stop_ids=frozenset(self.template.stop_ids(tokenizer)),
            adapter=adapter,
            strength=strength,
            text_stream=lambda: chat_text(self.tokenizer, chosen.stop, goes_on=continues),
        )
        reader = None
        opening = "" if continues or call else self.template.answer_opening
        if self.template.knows_tools or tokenizer.family is Family.TRANSFORMERS:
            reader = AnswerReader(
                tokenizer.family, has_tools=has_tools, goes_on=continues, call=call, opening=opening
            )
        return Answer(self.engine, request, reader, on_event, before=f"{call}\n" if call else opening)

    def answer(self, messages: Sequence[Message | Mapping[str, Any]], **options: Any) -> Answer:
        """Ask for an answer to messages.

        Args:
            messages: as for `prompt_ids`.
            options: ``tools``, ``continues`` and ``call`` as for `prompt_ids`, all else as for `submit`.
        """
        tools = options.pop("tools", ())
        form = {name: options[name] for name in ("continues", "call") if name in options}
        ids = self.prompt_ids(messages, tools=tools, **form)
        settings: dict[str, Any] = {"has_tools": bool(tools), **options}
        return self.submit(ids, **settings)

    def messages_for_history(self, finished: Finished) -> list[dict[str, str]]:
        """Return the messages with which an answer goes into the next prompt, as `model.chat` keeps them.

        Thoughts stand beside the answer; the folder's template decides whether a prompt shows them.

        Args:
            finished: the last event of the answer. One that went on with a message has only what came new.
        """
        family = cast("TextTokenizer", self.tokenizer).family
        response = process_response(family, finished.raw, tools_announced=finished.reason == "tool_calls")
        messages = [
            {"role": message.role, "content": message.content}
            | ({"metadata": message.metadata} if message.metadata else {})
            for message in response.messages
        ]
        if response.thoughts:
            messages[0][THOUGHTS_KEY] = response.thoughts
        return messages


class Answer:
    """An answer that is being written; iterating yields its events, closing the iterator cancels.

    The last event is `Finished`. A call that the answer was cut in ends without its closing brace, and the
    reason is then ``length``; it is ``tool_calls`` where the model ended an answer that has calls itself.
    """

    def __init__(
        self,
        engine: Submits,
        request: Request,
        reader: AnswerReader | None,
        on_event: Callable[[AnswerEvent], None] | None,
        *,
        before: str = "",
    ) -> None:
        """Submit the request.

        Args:
            engine: continues it.
            request: the prompt.
            reader: takes messages and calls apart; None where the text is an answer as it is.
            on_event: takes the events, in the engine's thread.
            before: the beginning of the model's words that stands in the prompt.
        """
        self._reader, self._on_event = reader, on_event
        self._raw = [before]
        self._num_new = 0
        self._has_calls = False
        self._logprobs: tuple[TokenLogprob, ...] = ()  # of tokens whose text is held back
        # The engine's thread may hand pieces over before `submit` returns: they wait for the generation.
        self._lock = threading.Lock()
        self._early: list[Piece] | None = []
        self.generation = engine.submit(request, None if on_event is None else self._push)
        with self._lock:
            early, self._early = self._early, None
            for piece in early:
                self._hand_over(piece)

    def cancel(self) -> None:
        """Ask the engine to stop."""
        self.generation.cancel()

    def __iter__(self) -> Iterator[AnswerEvent]:
        """Yield the events as they come; see the class."""
        pieces = iter(self.generation)
        try:
            for piece in pieces:
                yield from self._events(piece)
        finally:
            cast("Any", pieces).close()  # where the reader stopped early: this cancels

    def _push(self, piece: Piece) -> None:
        with self._lock:
            if self._early is not None:
                self._early.append(piece)
                return
        self._hand_over(piece)

    def _hand_over(self, piece: Piece) -> None:
        assert self._on_event is not None
        for event in self._events(piece):
            self._on_event(event)

    def _events(self, piece: Piece) -> Iterator[AnswerEvent]:
        self._num_new += len(piece.token_ids) + (piece.finish_reason == "eos")
        self._logprobs += piece.logprobs
        self._raw.append(piece.text)
        yield from self._with_logprobs(self._deltas(piece))
        if piece.finish_reason is None:
            return
        if self._logprobs:
            yield TextDelta("", self._logprobs)
        reason = "stop" if piece.finish_reason == "eos" else piece.finish_reason
        yield Finished(
            "tool_calls" if piece.finish_reason == "eos" and self._has_calls else reason,
            len(self.generation.request.prompt_ids),
            self._num_new,
            self.generation.num_cached_tokens,
            piece.error,
            "".join(self._raw),
            self.generation.is_tuned,
        )

    def _deltas(self, piece: Piece) -> list[Delta]:
        if self._reader is None:
            return [TextDelta(piece.text)] if piece.text else []
        deltas = self._reader.feed(piece.text) if piece.text else []
        if piece.finish_reason is not None:
            deltas += self._reader.finish(is_cut=piece.finish_reason != "eos")
        return deltas

    def _with_logprobs(self, deltas: list[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            if isinstance(delta, CallStart):
                self._has_calls = True
            elif self._logprobs:
                delta = replace(delta, logprobs=self._logprobs)
                self._logprobs = ()
            yield delta


def _role(message: Message | Mapping[str, Any]) -> object:
    return message.get("role") if isinstance(message, Mapping) else message.role


def with_limits(sampling: Sampling, **changes: Any) -> Sampling:
    """Return a copy with some fields changed; None leaves a field as it is."""
    return replace(sampling, **{name: value for name, value in changes.items() if value is not None})
