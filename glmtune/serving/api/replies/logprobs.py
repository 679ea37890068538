"""Log-probabilities in the two forms of OpenAI's: of chat, and the older one of completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from glmtune.inference.requests.request import TokenLogprob
from glmtune.serving.api.replies.tokens import TokenTexts

LEAST = -9999.0
"""Of a token that cannot come; JSON has no infinity. As in OpenAI's replies."""


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else LEAST


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Return the ``logprobs`` of a choice: an entry for each token."""
    return {
        "content": [
            {
                **_chat_entry(entry.token_id, LEAST if entry.logprob is None else entry.logprob, texts),
                "top_logprobs": [_chat_entry(token, logprob, texts) for token, logprob in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _chat_entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {
        "token": texts.text(token_id),
        "logprob": finite(logprob),
        "bytes": list(texts.bytes_of(token_id)),
    }


class LegacyLogprobs:
    """The ``logprobs`` of completions: a list entry for each token; offsets go on through chunks."""

    def __init__(self, texts: TokenTexts) -> None:
        """Start before the first token of the text."""
        self._texts = texts
        self._shown = b""
        self._num_shown = 0

    def json(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the lists of the next tokens."""
        texts = self._texts
        offsets: list[int] = []
        for entry in entries:
            offsets.append(self._num_shown)
            self._advance(entry.token_id)
        return {
            "text_offset": offsets,
            "token_logprobs": [None if each.logprob is None else finite(each.logprob) for each in entries],
            "tokens": [texts.legacy_text(each.token_id) for each in entries],
            "top_logprobs": [self._top(each) for each in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        if entry.logprob is None:
            return None
        # Two tokens may have one text (a character, and a byte that is it): the likelier counts.
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            name = self._texts.legacy_text(token)
            top[name] = max(finite(logprob), top.get(name, -math.inf))
        return top

    def _advance(self, token_id: int) -> None:
        """Count the characters that a token completes; command tokens do not stand in the text."""
        if self._texts.is_command(token_id):
            return
        data = self._texts.bytes_of(token_id)
        if not self._num_shown and not self._shown:
            data = data.removeprefix(b" ")  # sentencepiece writes a blank in front of a text
        self._shown += data
        whole = self._shown.decode("utf-8", "ignore")
        self._num_shown += len(whole)
        self._shown = self._shown[len(whole.encode()) :]
