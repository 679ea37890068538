"""What all extraction rules share: plain text out of Markdown, LaTeX and full-width characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from evaluation.sample import ALPHABET, Sample

RUN_ON = ("\nQ:", "\nQuestion:", "\n问题:", "\n问题：", "\n问:", "\n问：")
"""Where a model begins a question of its own; its answer to the one it was asked is over there."""
MAX_MARKS = 30
"""Combining marks read on one character, since NFKC takes the square of their number to put them in order.

The limit of Unicode's stream-safe texts (UAX 15, section 13); no language needs as many.
"""
_BECOME_MARKS = frozenset("\u0f73\u0f75\u0f81\uff9e\uff9f")  # no marks themselves, but NFKC makes them some
# Braces nest up to two levels inside, as in \boxed{\text{B}} and \boxed{\frac{1}{\sqrt{2}}}.
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|rm|bf)\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))")
# What NFKC would glue to the number before it: `2½` is no `21/2`.
_VULGAR_FRACTION = re.compile("([¼-¾⅐-⅞])")
_THINKING = re.compile(r"(?i:<(/?)think(?:ing)?>)")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|~")
_SUPERFLUOUS = re.compile(r"\*\*|__|`|\\\(|\\\)|\\\[|\\\]")
# Minus signs and blanks that NFKC leaves alone or turns into yet another dash.
_DASHES = str.maketrans(
    {"−": "-", "–": "-", "‑": "-", "﹣": "-", "⁄": "/", "\u2009": " ", "\u202f": " ", "\u00a0": " "}
)


def without_thinking(text: str) -> str:
    """Return what a model says when its thinking is over; empty where it is cut before that.

    A template may have opened the block, so that the completion only closes it; and thinking may speak of the
    marks themselves: whatever stands before a mark that closes nothing is thinking, too.

    >>> without_thinking("<think>Is it A?</think>It is B."), without_thinking("Is it A?</think>It is B.")
    ('It is B.', 'It is B.')
    >>> without_thinking("<think>It may be A")
    ''
    """
    said: list[str] = []
    begin, is_thinking = 0, False
    for mark in _THINKING.finditer(text):
        closes = bool(mark[1])
        if closes and not is_thinking:
            said.clear()
        elif not closes and not is_thinking:
            said.append(text[begin : mark.start()])
        begin, is_thinking = mark.end(), not closes
    return "".join(said) + ("" if is_thinking else text[begin:])


def thinks(text: str) -> bool:
    """Say whether a completion holds thinking, ended or not."""
    return _THINKING.search(text) is not None


def without_echo(text: str, sample: Sample) -> str:
    r"""Return a completion without the prompt, where it begins by repeating that.

    The exemplars of a repeated prompt have answers of their own, which are not the model's. What begins with
    no label and not with the question is an answer, whatever it repeats later.

    >>> without_echo("Q: 1+1?\nA: 2.\n\nQ: 2+2?\nA: 4.", Sample("gsm8k", "gsm8k", 0, "2+2?"))
    '\nA: 4.'
    """
    question = sample.question.strip()
    start = text.lstrip()
    begins = start.startswith((question, *(label.strip() for label in RUN_ON), "[Round "))
    place = text.find(question) if question and begins else -1
    if place < 0:
        return text
    rest = text[place + len(question) :]
    for letter, option in zip(ALPHABET, sample.choices, strict=False):
        line = f"\n{letter}. {option}"
        if not rest.startswith(line):
            break
        rest = rest[len(line) :]
    return rest


def plain(text: str) -> str:
    r"""Return a completion without Markdown marks, LaTeX wrappers and full-width forms.

    ``\boxed{X}`` becomes ``####X####``: a marker that the rules for explicit answers know. Chinese full stops
    and brackets that have an ASCII twin (NFKC) become that twin.

    >>> plain("**答案：（Ｂ）**")
    '答案:(B)'
    >>> plain(r"$\boxed{1{,}080}$")
    '$#### 1,080 $'
    >>> plain(r"2\frac{1}{2} and 2½")
    '2 1/2 and 2 1/2'
    """
    if not text.isascii():
        text = _VULGAR_FRACTION.sub(r" \1", text)
        text = "".join(_without_heaps_of_marks(text))
    # Dashes twice: NFKC would make U+2011 a U+2010, which the table lacks, and makes U+2212 of superscript
    # minus signs.
    text = unicodedata.normalize("NFKC", text.translate(_DASHES)).translate(_DASHES)
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _LATEX_TEXT.sub(r"\1", _LATEX_SPACE.sub(" ", text) if "\\" in text else text)
    text = _LATEX_FRACTION.sub(_fraction, text) if "frac" in text else text
    text = _BOXED.sub(r"#### \1 ", text)
    return _SUPERFLUOUS.sub("", text)


def _fraction(found: re.Match[str]) -> str:
    above, below = (found[1], found[2]) if found[1] is not None else (found[3], found[4])
    return f" {above.strip()}/{below.strip()}"


def _without_heaps_of_marks(text: str) -> Iterator[str]:
    num_marks = 0
    for character in text:
        is_mark = unicodedata.combining(character) or character in _BECOME_MARKS
        num_marks = num_marks + 1 if is_mark else 0
        if num_marks <= MAX_MARKS:
            yield character


def cut_at(text: str, stops: Sequence[str]) -> str:
    r"""Return the text before the first stop string.

    Saved completions of other tools may go on with questions of their own.

    >>> cut_at("It is 5.\nQ: And then?", ["\nQ:"])
    'It is 5.'
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
