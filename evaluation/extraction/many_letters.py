"""Rules that find the letter of an answer where a question has more than four options (MMLU-Pro, own ones).

`letters` reads A to D, and is sharper for them. With ten letters English itself gets in the way: `I think`
names no option I, `A car` no option A. So a letter counts where something states it, and by itself only where
no word can be meant.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from evaluation.extraction.text import RUN_ON, cut_at, plain, without_echo
from evaluation.sample import ALPHABET, Sample

_OPENING = r"[\s\"'“”‘’「『<(\[{$:,]*+(?:option|choice|letter|选项|选择|项)?+[\s\"'“”‘’「『<(\[{$:,]*+"
_END = r"(?![A-Za-z0-9'])"
_STATES_EN = (
    r"(?i:answer|correct option|correct choice|best option|best choice)"
    r"(?i:\s*(?:is|are|:|=|would be|must be|should be|has to be|will be|here|therefore|thus|most likely|"
    r"probably|to the question|to this question|option|choice|the|clearly|indeed))*+"
)
_STATES_ZH = (
    r"(?:答案|正确选项|正确的选项)(?:应该|应当|应|就|选项)?+(?:是|为|选|:|=)*+"
    r"|(?<![不可能])(?:故选|应选|选择|选)(?:是|为|:)?"
)
_SEVERAL = r"\s*+(?:[)\]]\s*+)?(?:和|与|或者|或|及|、|,|/|&|and\b|or\b)\s*+[(\[]?"
# `I think`, `A car`: words. An `I` or `A` by itself is an option only before a mark or at the end of its
# line.
_WORD = r"(?:A|I)(?=\s+[a-z])(?!\s+(?:is|because|since|as|for|and|or)\b)|I(?='|’)"


class _Patterns(NamedTuple):
    states: re.Pattern[str]
    several: re.Pattern[str]
    right: re.Pattern[str]
    first: re.Pattern[str]
    alone: re.Pattern[str]


@lru_cache(maxsize=len(ALPHABET))
def _patterns(count: int) -> _Patterns:
    letters = f"[A-{ALPHABET[count - 1]}]"
    # `The answer is I think`: an I or A that goes on as a word states nothing.
    letter = rf"(?!{_WORD}){letters}{_END}"
    stated = rf"(?:(?<!#)####++|{_STATES_EN}|{_STATES_ZH}){_OPENING}({letter})"
    return _Patterns(
        states=re.compile(stated),
        several=re.compile(rf"{_SEVERAL}{letters}{_END}"),
        right=re.compile(
            rf"(?<![A-Za-z0-9])[(\[]?({letter})[)\]]?\s*+"
            r"(?:是正确|正确|(?i:is (?:the )?(?:correct|right|best)))"
        ),
        first=re.compile(rf"\s*[(\[]?({letters})(?:[)\].、:,。]|\s*$)(?![A-Za-z0-9'])"),
        alone=re.compile(rf"(?<![A-Za-z0-9'’])({letter})"),
    )


def loose(text: str, sample: Sample) -> str | None:
    r"""Extract what a careful reader would; None where nothing, or more than one letter, is named.

    In this order: the last explicit statement (``the answer is (G)``, ``答案是G``, ``\boxed{G}``); the last
    letter called right; a letter that the first or the last line begins with; the only letter standing alone;
    an option repeated word for word.

    >>> ten = Sample("mmlu_pro", "law", 0, "?", choices=tuple("0123456789"))
    >>> loose("I think G is tempting. The answer is (H).", ten), loose("I do not know.", ten)
    ('H', None)
    """
    if not sample.choices:
        return None
    found = _patterns(min(len(sample.choices), len(ALPHABET)))
    said = plain(cut_at(without_echo(text, sample), RUN_ON))
    if statements := list(found.states.finditer(said)):
        last = statements[-1]
        return None if found.several.match(said, last.end()) else last[1]
    if called_right := found.right.findall(said):
        return called_right[-1]
    lines = said.strip().splitlines()
    # Two or more such lines are the options written out once more, not an answer.
    if sum(found.first.match(line) is not None for line in lines) == 1:
        for line in (lines[0], lines[-1]):
            first = found.first.match(line)
            if first and not found.several.match(line, first.end(1)):
                return first[1]
    alone = set(found.alone.findall(said))
    if alone:
        return alone.pop() if len(alone) == 1 else None
    return _repeated(lines, sample)


def _repeated(lines: list[str], sample: Sample) -> str | None:
    options = {
        plain(text).strip(" .。").casefold(): letter
        for letter, text in zip(ALPHABET, sample.choices, strict=False)
    }
    return next(
        (options[bare] for line in lines if (bare := line.strip(" .。").casefold()) and bare in options), None
    )
