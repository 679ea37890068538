"""The rule by which CMMLU's repository reads a letter from a completion, its order and its faults included.

Source: ``extract_choice`` in ``src/mp_utils.py`` of haonan-li/CMMLU @ d6e7b71. Two things are left out: it
draws a letter at random where it finds none, which here counts as not understood; and it is shown no
thinking.
"""

from __future__ import annotations

import re

from evaluation.sample import LETTERS, Sample

# In this order; the last group of each is the letter.
_STATED = tuple(
    re.compile(pattern)
    for pattern in (
        r"答案(?:选项)?(?:是|为)：? ?([ABCD])",
        r"答案(?:是|为)选项 ?([ABCD])",
        r"故?选择?：? ?([ABCD])",
        r"([ABCD]) ?选?项(?:是|为)?正确",
        r"正确的?选项(?:是|为) ?([ABCD])",
        r"答案(?:应该)?(?:是|为)([ABCD])",
        r"选项 ?([ABCD]) ?(?:是|为)?正确",
        r"选择答案 ?([ABCD])",
        r"答案?：?([ABCD])",
        r"([ABCD])(?:选?项)?是?符合题意",
        r"答案选项：? ?([ABCD])",
    )
)
_STATED_LATER = "答案选项为", "答案为"
_CALLED = "当选", "正确"
_WEAK = re.compile(r"[^不]是：? ?([ABCD])")


def official(text: str, sample: Sample) -> str | None:
    """Extract as the repository does; None where it would draw a letter.

    The first character where it is a letter, then its wordings in order, then the letter before ``当选`` or
    ``正确`` in one line, then ``是X``, then the only letter of the text.
    """
    del sample
    if text[:1] in tuple(LETTERS):
        return text[0]
    for pattern in _STATED:
        if found := pattern.search(text):
            return found[1]
    lines = text.split("\n")
    if letter := next((letter for line in lines if (letter := _stated_later(line))), None):
        return letter
    for word in _CALLED:
        if letter := next((letter for line in lines if (letter := _called(line, word))), None):
            return letter
    if found := _WEAK.search(text):
        return found[1]
    letters = re.findall("[ABCD]", text)
    return letters[0] if len(letters) == 1 else None


def _stated_later(line: str) -> str | None:
    """Return the first letter of a line behind ``答案为``.

    By hand, as an expression would look on from every cue anew.
    """
    places = [place + len(cue) for cue in _STATED_LATER if (place := line.find(cue)) >= 0]
    if not places:
        return None
    found = re.search("[ABCD]", line[min(places) :])
    return found[0] if found else None


def _called(line: str, word: str) -> str | None:
    """Return the letter nearest before a line's first word that has one before it.

    The repository searches again behind each letter it finds as long as the word follows, which ends at the
    nearest.
    """
    first = re.search("[ABCD]", line)
    place = -1 if first is None else line.find(word, first.end())
    return re.findall("[ABCD]", line[:place])[-1] if place >= 0 else None
