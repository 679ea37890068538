"""Strings that end a completion, looked for while it is being generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glmtune.inference.requests.text_stream import first_stop

Decode = Callable[[Sequence[int]], str]

MARGIN_TOKENS = 8
"""Tokens decoded in front of the longest stop string's, as the first of them may lose its blank or bytes."""


class StopText:
    """Finds stop strings in the text of generated tokens and cuts the text there."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        """Keep the decoder and the strings, none empty."""
        self._decode = decode
        self._stop = tuple(stop)
        # A token that is text stands for at least one byte of it.
        self._window = MARGIN_TOKENS + max((len(text.encode()) for text in stop), default=0)

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """Whether a stop string occurs, given that none did before the last token."""
        if not self._stop:
            return False
        # Decoding all tokens after each would make a long completion quadratic; the tail alone may show a
        # stop string that the whole text does not have (its first token decoded wrongly), hence both.
        tail = self._decode(token_ids[-self._window :])
        return any(text in tail for text in self._stop) and self._place(self._decode(token_ids)) is not None

    def watch(self) -> StopWatch:
        """Return what watches the tokens of one completion."""
        return StopWatch(self)

    def text(self, token_ids: Sequence[int]) -> str:
        """Decode tokens up to the first stop string, which is left out."""
        text = self._decode(token_ids)
        return text[: self._place(text)]

    def _place(self, text: str) -> int | None:
        return first_stop(text, dict.fromkeys(self._stop, 0))


class StopWatch:
    """Watches one completion for stop strings; its text is decoded once it is over (see `TextStream`)."""

    def __init__(self, stop_text: StopText) -> None:
        """Start without tokens."""
        self.is_stopped = False
        self._stop_text = stop_text
        self._token_ids: list[int] = []

    def feed(self, token_id: int) -> str:
        """Take the next token; no text is handed out."""
        self._token_ids.append(token_id)
        self.is_stopped = self._stop_text.is_complete(self._token_ids)
        return ""

    def finish(self) -> str:
        """Return nothing: the text is asked of `StopText`."""
        return ""
