"""What all extraction rules share: plain text out of Markdown, LaTeX and full-width characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Braces nest up to two levels inside, as in \boxed{\text{B}} and \boxed{\frac{1}{\sqrt{2}}}.
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|rm|bf)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|~")
_SUPERFLUOUS = re.compile(r"\*\*|__|`|\\\(|\\\)|\\\[|\\\]")
# Minus signs and blanks that NFKC leaves alone or turns into yet another dash.
_DASHES = str.maketrans(
    {"−": "-", "–": "-", "‑": "-", "﹣": "-", "\u2009": " ", "\u202f": " ", "\u00a0": " "}
)


def plain(text: str) -> str:
    r"""Return a completion without Markdown marks, LaTeX wrappers and full-width forms.

    ``\boxed{X}`` becomes ``####X####``: a marker that the rules for explicit answers know. Chinese full stops
    and brackets that have an ASCII twin (NFKC) become that twin.

    >>> plain("**答案：（Ｂ）**")
    '答案:(B)'
    >>> plain(r"$\boxed{1{,}080}$")
    '$#### 1,080 $'
    """
    # Dashes twice: NFKC would make U+2011 a U+2010, which the table lacks, and makes U+2212 of superscript
    # minus signs.
    text = unicodedata.normalize("NFKC", text.translate(_DASHES)).translate(_DASHES)
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _LATEX_TEXT.sub(r"\1", _LATEX_SPACE.sub(" ", text) if "\\" in text else text)
    text = _BOXED.sub(r"#### \1 ", text)
    return _SUPERFLUOUS.sub("", text)


def cut_at(text: str, stops: Sequence[str]) -> str:
    r"""Return the text before the first stop string.

    Saved completions of other tools may go on with questions of their own.

    >>> cut_at("It is 5.\nQ: And then?", ["\nQ:"])
    'It is 5.'
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
