r"""Answers to competition problems: what a solution boxes, and when two formulas say the same.

Formulas are compared as texts first, after what is only typography is taken out (``\dfrac`` is ``\frac``,
``\left(`` is ``(``); where these differ, `equality` asks a computer algebra system.
"""

from __future__ import annotations

import re

from evaluation.extraction.equality import are_equal
from evaluation.extraction.text import RUN_ON, cut_at, without_echo
from evaluation.sample import Sample

MAX_CHARS = 1_000
"""Of an answer; what is longer is a text and no formula."""
STOPS = (*RUN_ON, "\nProblem:")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STATED = re.compile(r"(?i:answer is|answer:)[\s:*]*(?=\S)")
_INSIDE = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_FINAL = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_MOST_BOXES = 20
"""Looked at, from the last one back: a completion may repeat an open one without end."""
_TYPOGRAPHY = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr)(?=[^A-Za-z]|\\)"), ""),
    (re.compile(r"\\(?:text|textbf|mathrm|mbox|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[,;:! ]|~|\\quad|\\qquad"), ""),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°"), ""),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\\$|\$|\\%|%"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})"), ""),
    (re.compile(r"\s+"), ""),
)


def last_box(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` holds, whatever braces are in it; None where none is closed.

    >>> last_box(r"so \boxed{\frac{1}{2}} or rather \boxed{\{1, 2\}}.")
    '\\{1, 2\\}'
    """
    for start in reversed([match.end() for match in _BOX.finditer(text)][-_MOST_BOXES:]):
        depth, place = 1, start
        while place < len(text) and place < start + MAX_CHARS:
            sign = text[place]
            if sign == "\\":  # an escaped brace is no brace
                place += 2
                continue
            depth += (sign == "{") - (sign == "}")
            if not depth:
                return text[start:place].strip() or None
            place += 1
    return None


def boxed(text: str, sample: Sample) -> str | None:
    r"""Extract what the last ``\boxed{}`` holds."""
    return last_box(cut_at(without_echo(text, sample), STOPS))


def loose(text: str, sample: Sample) -> str | None:
    """Extract the last box, else what follows the last `answer is` up to the end of its sentence."""
    said = cut_at(without_echo(text, sample), STOPS)
    if found := last_box(said):
        return found
    cues = list(_STATED.finditer(said))
    if not cues:
        return None
    rest = said[cues[-1].end() :].partition("\n")[0][:MAX_CHARS]
    if inside := _INSIDE.match(rest):
        return next(part for part in inside.groups() if part).strip() or None
    sentence = re.split(r"\.(?:\s|$)", rest, maxsplit=1)[0]  # the point of 3.5 has no blank behind it
    return sentence.strip().strip("*").strip() or None


def minerva(text: str, sample: Sample) -> str | None:
    """Extract as Lewkowycz et al. do: the text between `The final answer is` and `I hope it is correct`.

    Source:
        arXiv:2206.14858, appendix D.
    """
    del sample
    found = _FINAL.search(f"{text}I hope it is correct.")
    answer = found[1].strip().strip("$").strip() if found else ""
    return answer or None


def tidy(formula: str) -> str:
    r"""Return a formula without what is only typography.

    >>> tidy(r"\left(3,\ \dfrac{\pi}{2}\right)"), tidy(r"x = 1{,}080"), tidy(r"90^\circ")
    ('(3,\\frac{\\pi}{2})', '1080', '90')
    """
    for pattern, replacement in _TYPOGRAPHY:
        formula = pattern.sub(replacement, formula)
    formula = formula.strip().removesuffix(".")
    if _THOUSANDS.fullmatch(formula):  # a number by itself; in `(1,234)` the comma parts two
        formula = formula.replace(",", "")
    # `x = 5` says 5; an equation of more than one letter on its left is the answer itself.
    return re.sub(r"^[a-zA-Z]=", "", formula) if formula.count("=") == 1 else formula


def is_the_same_text(extracted: str, sample: Sample) -> bool:
    """Compare two formulas as tidied texts."""
    return tidy(extracted) == tidy(sample.answer)


def is_the_same_formula(extracted: str, sample: Sample) -> bool | None:
    """Compare two formulas by value: as texts first, then by the computer algebra of `equality`.

    Returns:
        None where that came to no end in its time.
    """
    if is_the_same_text(extracted, sample):
        return True
    if max(len(extracted), len(sample.answer)) > MAX_CHARS:
        return False
    return are_equal(sample.answer, extracted)
