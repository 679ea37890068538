r"""The clean-ups of `responses` for text that comes in pieces: each is handed out once it is final.

What is cleaned away, or changed by a right neighbour, is held back until that is decided::

    pieces      "ok"  ","  "你好"   "[["  "训练"  "时间]]"  " "  end
    handed out  "ok"       "，你好"                "2023年"

Joined, what is handed out is what `responses` makes of the whole text. No step looks at text that was handed
out, but for its last character, so the work per piece does not grow with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from glmtune.models.releases.families import Family
from glmtune.models.templates.responses import YEAR, YEAR_PLACEHOLDER, is_chinese, widen_marks
from glmtune.models.templates.thinking import CLOSE, OPEN

_MARKS = ",!:;?"


class Cleaner(Protocol):
    """Changes a text that comes in pieces."""

    def feed(self, text: str) -> str:
        """Take more text; return what is final now."""
        ...

    def finish(self) -> str:
        """Return the rest: nothing follows."""
        ...


class Strip:
    """Takes blanks off the beginning and the end, as `str.strip` does."""

    def __init__(self, *, leading: bool = True) -> None:
        """Start; ``leading=False`` leaves those at the beginning."""
        self._is_leading = leading
        self._blanks: list[str] = []  # behind the text so far

    def feed(self, text: str) -> str:
        """Take more text; return what is final now."""
        if self._is_leading:
            text = text.lstrip()
            self._is_leading = not text
        kept = text.rstrip()
        if not kept:
            self._blanks.append(text)
            return ""
        out = "".join([*self._blanks, kept])
        self._blanks = [text[len(kept) :]]
        return out

    def finish(self) -> str:
        """Return nothing: blanks at the end are taken off."""
        return ""


class FillInYear:
    """Puts the year where the releases' training data has a placeholder."""

    def __init__(self) -> None:
        """Start."""
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more text; return what is final now."""
        *before, last = (self._held + text).split(YEAR_PLACEHOLDER)
        num_held = overlap(last, YEAR_PLACEHOLDER)
        self._held = last[len(last) - num_held :]
        return YEAR.join([*before, last[: len(last) - num_held]])

    def finish(self) -> str:
        """Return the beginning of a placeholder that was none."""
        text, self._held = self._held, ""
        return text


class WidenMarks:
    """Makes marks next to Chinese characters full-width; the right neighbour may still be to come."""

    def __init__(self) -> None:
        """Start."""
        self._before = self._held = ""  # the last character handed out, as it was; a mark behind it

    def feed(self, text: str) -> str:
        """Take more text; return what is final now."""
        text = self._before + self._held + text
        self._held = text[-1:] if text[-1:] in _MARKS and not is_chinese(text[-2:-1]) else ""
        return self._widened(text[: len(text) - len(self._held)])

    def finish(self) -> str:
        """Return the last mark, which has no right neighbour."""
        text, self._held = self._before + self._held, ""
        return self._widened(text)

    def _widened(self, text: str) -> str:
        out = widen_marks(text)[len(self._before) :]
        self._before = text[-1:]
        return out


class Chain:
    """One clean-up after the other."""

    def __init__(self, steps: Sequence[Cleaner]) -> None:
        """Start with the steps, in their order."""
        self._steps = steps

    def feed(self, text: str) -> str:
        """Take more text; return what is final now."""
        for step in self._steps:
            text = step.feed(text) if text else ""
        return text

    def finish(self) -> str:
        """Return the rest."""
        text = ""
        for step in self._steps:
            text = (step.feed(text) if text else "") + step.finish()
        return text


class ThoughtSplit:
    """Parts thoughts from the answer behind them, in a text that begins with their tag or has none.

    Blanks around both are taken off, as `split_thoughts` does, but for blanks at the end of the answer.
    """

    def __init__(self) -> None:
        """Start in front of the first character."""
        self._place = "begin"  # then "thoughts", "gap" (blanks behind the tag), "answer"
        self._held = ""  # may be the beginning of a tag
        self._blanks = Strip()

    def feed(self, text: str) -> tuple[str, str]:
        """Take more text; return what is final now of the thoughts, and of the answer."""
        if self._place == "answer" or not text:
            return "", text
        text, self._held = self._held + text, ""
        thoughts = ""
        if self._place == "begin":
            begun = text.lstrip()
            if len(begun) < len(OPEN) and OPEN.startswith(begun):
                self._held = text
                return "", ""
            if not begun.startswith(OPEN):
                self._place = "answer"
                return "", text
            self._place, text = "thoughts", begun.removeprefix(OPEN)
        if self._place == "thoughts":
            inside, close, text = text.partition(CLOSE)
            if not close:
                num_held = overlap(inside, CLOSE)
                self._held = inside[len(inside) - num_held :]
                return self._blanks.feed(inside[: len(inside) - num_held]), ""
            thoughts, self._place = self._blanks.feed(inside), "gap"
        answer = text.lstrip()
        if answer:
            self._place = "answer"
        return thoughts, answer

    def finish(self) -> tuple[str, str]:
        """Return the beginning of a tag that was none."""
        held, self._held = self._held, ""
        return (self._blanks.feed(held), "") if self._place == "thoughts" else ("", held)


def cleaner_of(family: Family, *, goes_on: bool = False) -> Chain:
    """Return what cleans the text of an answer as the release does.

    Args:
        family: the release.
        goes_on: the text stands behind one that is there already, so that blanks in front of it stay.
    """
    if family is Family.CODEGEEX2:
        return Chain(())
    if family is Family.TRANSFORMERS:
        return Chain([Strip(leading=not goes_on)])
    steps: list[Cleaner] = [Strip(leading=not goes_on), FillInYear()]
    return Chain([*steps, WidenMarks()] if family is Family.CHATGLM else steps)


def overlap(text: str, word: str) -> int:
    """Return how many characters at the end of a text are the beginning of a word, but not all of it.

    >>> overlap("a [[训", "[[训练时间]]")
    3
    """
    end = text[1 - len(word) :] if len(word) > 1 else ""
    place = end.find(word[0])
    while place >= 0 and not word.startswith(end[place:]):
        place = end.find(word[0], place + 1)
    return len(end) - place if place >= 0 else 0
