"""Rules for questions that carry their own key: the number, letter or words that a right answer has.

A key must be fair to every model, whatever it writes around the answer: where the key is `巴黎|Paris`, all of
`Paris.`, `The capital is **Paris**.` and `巴黎（Paris）` are right.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from evaluation.extraction import letters, numbers
from evaluation.extraction.text import RUN_ON, cut_at, plain, without_echo
from evaluation.sample import Sample

NUMBER = "number"
LETTER = "letter"
CONTAINS = "contains"
BETWEEN_FORMS = "|"
"""Between the forms of a key of which one is enough."""
SHOWN_CHARS = 80
"""Of an answer without any form of its key: reports show it as what was said instead."""
_CASE_MATTERS_BELOW = 4
"""Letters: `Co` is cobalt and `CO` a gas, `he` no helium; a longer word may begin a sentence."""
# `H_2O` and `$\text{H}_{2}\text{O}$` say H2O; `plain` has unwrapped the rest.
_SUBSCRIPTS = str.maketrans("", "", "_${}")


def extract(text: str, sample: Sample) -> str | None:
    """Read an answer by the rule of its question; None where nothing was found.

    Args:
        text: the completion.
        sample: its ``rule`` is ``number``, ``letter`` or ``contains``.
    """
    return _EXTRACT[sample.rule](text, sample)


def is_right(extracted: str, sample: Sample) -> bool:
    """Say whether what `extract` found is the key: numbers by value, letters and words as they are."""
    if sample.rule == NUMBER:
        return numbers.is_the_same_number(extracted, sample)
    return extracted in forms(sample.answer)


def forms(key: str) -> tuple[str, ...]:
    """Return the forms of a key, one of which a right answer has.

    >>> forms("巴黎|Paris")
    ('巴黎', 'Paris')
    """
    return tuple(key.split(BETWEEN_FORMS))


def holds(text: str, form: str) -> bool:
    """Say whether a plain text has a form of a key, not as a part of a longer word or number.

    >>> holds("The symbol is Cu.", "C"), holds("12 legs", "2")
    (False, False)
    >>> holds("it is PARIS", "Paris"), holds("一周有7天", "7")
    (True, True)
    """
    is_long = len(form) >= _CASE_MATTERS_BELOW
    # Chinese has no blanks between words, so that only Latin letters and digits may not touch a form.
    before = r"(?<![A-Za-z0-9])" if form[:1].isascii() else ""
    after = r"(?![A-Za-z0-9])" if form[-1:].isascii() else ""
    return re.search(before + re.escape(form) + after, text, re.IGNORECASE if is_long else 0) is not None


def _words(text: str, sample: Sample) -> str | None:
    """Return the first form of the key that the answer has, else the beginning of what it says instead."""
    said = plain(cut_at(without_echo(text, sample), RUN_ON)).translate(_SUBSCRIPTS)
    found = next((form for form in forms(sample.answer) if holds(said, form)), None)
    return found or said.strip()[:SHOWN_CHARS] or None


_EXTRACT: dict[str, Callable[[str, Sample], str | None]] = {
    NUMBER: numbers.decimal,
    LETTER: letters.loose,
    CONTAINS: _words,
}
RULES = tuple(_EXTRACT)
"""Names of the rules that a question may have."""
