"""The text of an answer as it becomes final: whole characters, cut at a stop text, cleaned as released."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from glmtune.models.releases.families import Family
from glmtune.models.templates.base import TextTokenizer
from glmtune.models.templates.renderer import template_for
from glmtune.models.templates.streamed_responses import Chain, Cleaner, cleaner_of, overlap
from glmtune.models.tokenizers.token_text import TokenText
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer


def first_stop(text: str, starts: Mapping[str, int]) -> int | None:
    """Return where the first stop text begins; None: there is none.

    Args:
        text: in which to look.
        starts: stop texts, and from where on each counts.
    """
    places = (text.find(stop, start) for stop, start in starts.items())
    return min((place for place in places if place >= 0), default=None)


class StopSearch:
    """Cuts a text that comes in pieces at the first stop text, of which nothing is handed out before."""

    def __init__(self, stop: Sequence[str], *, after_blanks: bool = False) -> None:
        """Start to search.

        Args:
            stop: the stop texts, none empty.
            after_blanks: blanks at the beginning of the text are taken off later, so that stop texts of
                nothing but blanks count only behind them. (Answers of ChatGLM3 begin with a line break, which
                is no end of a line: a stop text of one would end each of them at once.)
        """
        self.is_stopped = False
        self._stop = tuple(stop)
        self._is_in_blanks = after_blanks
        self._held = ""  # the longest end of the text so far that may be the beginning of a stop text

    def feed(self, text: str) -> str:
        """Take more text; return what is final now."""
        if self.is_stopped or not text:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        num_blanks = len(text) - len(text.lstrip()) if self._is_in_blanks else 0
        self._is_in_blanks = self._is_in_blanks and num_blanks == len(text)
        starts = {stop: 0 if stop.strip() else num_blanks for stop in self._stop}
        if (place := first_stop(text, starts)) is not None:
            self.is_stopped, self._held = True, ""
            return text[:place]
        num_held = max((overlap(text[start:], stop) for stop, start in starts.items()), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return the beginning of a stop text that was none."""
        text, self._held = self._held, ""
        return text


class AnswerText:
    """Turns tokens into text (see `TextStream`): decoded, cut at a stop text, cleaned."""

    def __init__(self, tokens: TokenText, search: StopSearch, cleaner: Cleaner) -> None:
        """Take what does the three steps.

        Args:
            tokens: decodes tokens one by one.
            search: finds stop texts.
            cleaner: changes what is left as the release does.
        """
        self.is_stopped = False
        self._tokens, self._search, self._cleaner = tokens, search, cleaner

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that became final."""
        if self.is_stopped:
            return ""
        text = self._cleaner.feed(self._search.feed(self._tokens.feed(token_id)))
        self.is_stopped = self._search.is_stopped
        return text + self._cleaner.finish() if self.is_stopped else text

    def finish(self) -> str:
        """Return the rest: no token follows."""
        if self.is_stopped:
            return ""
        text = self._search.feed(self._tokens.finish()) + self._search.finish()
        self.is_stopped = self._search.is_stopped
        return self._cleaner.feed(text) + self._cleaner.finish()


def completion_text(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), *, goes_on: bool = False
) -> AnswerText:
    """Return the text stream of a plain completion: decoded without special tokens, nothing cleaned.

    Args:
        tokenizer: one of ours.
        stop: texts that end it, none empty.
        goes_on: the text is put behind its prompt, so that a blank in front of it stays.
    """
    tokens = _token_text(tokenizer, skip_special_tokens=True, goes_on=goes_on)
    return AnswerText(tokens, StopSearch(stop), Chain(()))


def chat_text(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), *, goes_on: bool = False
) -> AnswerText:
    """Return the text stream of a chat answer.

    It is cleaned as the release does, but for ChatGLM3, GLM-4 and folders in transformers' format, whose
    thoughts, messages and calls of tools are taken apart first (see `Answer`): role names still separate
    their messages.

    Args:
        tokenizer: one of ours.
        stop: texts that end it, none empty. They are looked for in what the model writes, before cleaning.
        goes_on: the answer's beginning stands in the prompt, so that blanks in front stay.
    """
    family = cast("TextTokenizer", tokenizer).family
    keeps_blanks = goes_on or family is Family.CODEGEEX2
    knows_tools = template_for(cast("TextTokenizer", tokenizer)).knows_tools
    return AnswerText(
        _token_text(tokenizer, skip_special_tokens=not knows_tools, goes_on=goes_on),
        StopSearch(stop, after_blanks=not keeps_blanks),
        Chain(()) if knows_tools or family is Family.TRANSFORMERS else cleaner_of(family, goes_on=goes_on),
    )


def _token_text(
    tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool, goes_on: bool = False
) -> TokenText:
    """Return the decoder of an answer: tokens that end answers are no text, also where they do not end it."""
    ours = cast("VocabularyTokenizer", tokenizer)
    ends: Collection[int] = template_for(ours).stop_ids(ours)
    return ours.token_text(skip_special_tokens=skip_special_tokens, left_out=ends, goes_on=goes_on)
