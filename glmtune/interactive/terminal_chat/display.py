"""An answer as it is shown: text as it comes, calls of tools as what they are, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from rich.text import Text

from glmtune.inference.requests.chat import (
    AnswerEvent,
    CallDelta,
    CallStart,
    Finished,
    TextDelta,
    ThoughtDelta,
)
from glmtune.interactive.conversation import AnswerParts
from glmtune.terminal.console import Console, plain
from glmtune.terminal.text import write_now

CALL_STYLE = "bold yellow"
THOUGHT_STYLE = "dim"
NOTE_STYLE = "dim"
ERROR_STYLE = "red"


class Display:
    """Shows a conversation on a terminal. What models, files and servers wrote is text, never an order."""

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Write to standard output.

        Args:
            console: for all that is not a model's own words.
            clock: seconds, for tests.
        """
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._clock = clock

    def note(self, text: str) -> None:
        """Say something beside the conversation."""
        self.console.print(plain(text, NOTE_STYLE))

    def say(self, text: str | Text) -> None:
        """Answer a command."""
        self.console.print(plain(text) if isinstance(text, str) else text)

    def error(self, text: str) -> None:
        """Say what went wrong."""
        self.console.print(plain(text, ERROR_STYLE))

    def clear(self) -> None:
        """Empty the screen."""
        self.console.clear()

    def answer(self, events: Iterable[AnswerEvent], parts: AnswerParts) -> None:
        """Show an answer while it comes; what is thought before it is dimmed, and stands apart.

        Args:
            events: of the answer.
            parts: takes them as well, so that what came is there if an error ends it.

        Raises:
            GlmtuneError: the answer failed.
        """
        began, first = self._clock(), 0.0
        is_at_start, is_thinking = True, False
        try:
            for event in events:
                first = first or self._clock()
                parts.add(event)
                if isinstance(event, ThoughtDelta):
                    self.console.print(plain(event.thoughts, THOUGHT_STYLE), end="")
                    write_now("")
                    is_at_start, is_thinking = event.thoughts.endswith("\n"), True
                    continue
                if is_thinking:
                    write_now("\n" if is_at_start else "\n\n")
                    is_at_start, is_thinking = True, False
                if isinstance(event, TextDelta) and event.text:
                    write_now(event.text)
                    is_at_start = event.text.endswith("\n")
                elif isinstance(event, CallStart):
                    if not is_at_start:
                        write_now("\n")
                    self.console.print(plain(f"calls {event.name} ", CALL_STYLE), end="")
                    write_now("")
                    is_at_start = False
                elif isinstance(event, CallDelta):
                    write_now(event.arguments)
        finally:
            if not is_at_start:
                write_now("\n")
        if parts.finished is not None:
            self._end(parts.finished, first - began, self._clock() - first)

    def _end(self, finished: Finished, waited: float, seconds: float) -> None:
        """Say how an answer ended, and how fast it was: the first token is the prompt's, not the rate's."""
        if finished.reason == "cancelled":
            self.note("[stopped]")
            return
        num_tokens = finished.num_new_tokens
        words = [f"{num_tokens} tokens"] if num_tokens else []
        if num_tokens > 1 and seconds > 0:
            words.append(f"{(num_tokens - 1) / seconds:.1f} tokens/s")
        if waited >= 1:
            words.append(f"first after {waited:.1f} s")
        if finished.is_tuned is not None:
            words.append("tuned" if finished.is_tuned else "base")
        if finished.reason == "length":
            words.append("cut at the longest answer or the end of the context: /max_new_tokens")
        if words:
            self.note(f"[{', '.join(words)}]")
