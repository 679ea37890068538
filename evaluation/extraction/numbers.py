"""Rules that find the number a word problem ends in (GSM8K, MGSM), and compare numbers as decimals.

``official`` and ``strict`` fail where the model words its answer otherwise, ``flexible`` takes whatever
number comes last (``The answer is 18. She checks it: 18 - 9 = 9.`` is 9 for it), so the deciding rule is
``decimal``: the number of the last stated answer, compared by value. Completions quoted below are cases of
``tests/evaluation/extraction/extraction_cases.json``.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from itertools import pairwise

from evaluation.extraction.numerals import number_in_words
from evaluation.extraction.text import cut_at, plain, without_echo
from evaluation.sample import Sample

# Where a model begins a question of its own; a completion is over there.
STOPS = ("\nQ:", "\nQuestion:", "\n问题:", "\n问题：", "\n问：")

_OFFICIAL = re.compile(r"#### (-?[0-9.,]+)")
_STRICT = re.compile(
    r"(?:[Tt]he answer is|答案是)[ :：]*(-?[$¥]?-?[0-9][0-9,]*+(?:\.[0-9]++)?)(?!\s*/\s*[0-9])"
)
# What states an answer: `####` (no heading such as `#### Step 3`); `answer` with a verb behind it, or not far
# behind `the answer` (`The answer to the question is 18`); either right before the number. Not `the answer
# helps all 3 of you`, nor `the long answer questions`, nor what is hoped or asked of an answer. `答` counts
# only as a label (`答：小明还剩18个苹果`), since it is part of many words.
_VERB = r"(?:(?<!\w)(?i:is|are|was|equals|will be|would be|must be|should be)\b|:|=)"
_NEAR = r"(?=[\s*—>-]{0,8}+(?:US\$|RMB|[$¥€£])?\s?-?\.?\d)"
_MARKER = re.compile(
    r"(?P<void>(?i:\b(?:hope|if|whether) (?:that )?(?:the |this |my )?answer\b)|希望(?:这个)?答案)"
    r"|(?P<formal>####)(?!#)(?!\s*(?i:step|part|第|步))"
    r"|(?i:\b(?:the |final |correct )answer\b)"
    rf"(?:[^\n.:=;!?。]{{0,40}}?{_VERB}(?:\s*{_VERB})*|{_NEAR})"
    rf"|(?i:\banswer)\s*{_VERB}(?:\s*{_VERB})*"
    rf"|答案(?:应该|应当|应|就|即)?(?:(?:是|为|等于|:|=)+|{_NEAR})|答(?=:)"
)
# The number comes at once, or as `x = 18`, `about 18`.
_AT_ONCE = re.compile(
    r"[\s$(\[\"'“”*:~≈]*+(?:(?i:about|approximately|约|大约)\s*)?(?:\w\s?=\s?)?"
    r"(?:US\$|RMB|[$¥€£])?\s?-?\s?\.?\d"
)
_MONEY = r"(?:US\$|RMB|[$¥€£])?"
# In this order: `70,000`; `1 000` (a blank before every three digits, and nothing behind: `1 200 apples` may
# be the end of a list); plain digits; `.75`.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:\s\d{3})+(?![\d,]|\.\d|\s?[a-z])|\d+)(?:\.\d+)?|\.\d+"
# A minus is a sign only where no number or bracket stands before it: `10-5=5` ends in 5, `-$5` and `$-5` are
# -5. `3/4` and `2 1/2` are one number each, `9/11/2001` is no fraction. 千克 and 千米 are units.
_NUMBER = re.compile(
    r"(?<![\d.])(?P<sign>(?<![\w)\]])-\s?|\b(?i:minus|negative)\s)?"
    rf"{_MONEY}\s?(?P<minus>-)?"
    rf"(?:(?P<whole>\d{{1,9}})\s(?=\d{{1,9}}/\d))?(?P<digits>{_DIGITS})"
    r"(?:\s?/\s?(?P<below>\d++(?:\.\d++)?)(?!\s?/\s?\d))?"
    r"\s?(?P<scale>万|亿|千(?![克米瓦卡])|百(?!分)|million\b|billion\b|thousand\b)?"
)
_SCALES = {
    "百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8, "thousand": 10**3, "million": 10**6, "billion": 10**9,
}  # fmt: skip
_LONGEST_FRACTION = 40
"""Digits of a numerator or denominator; no problem has as many, and Python reads long numbers slowly."""
_JOINED = re.compile(
    r"[+*×÷^·∗]|\\(?:times|cdot|div)|\b(?i:times|plus|minus|multiplied by|divided by)\b|[乘加减除]"
)
_SENTENCE_BEGIN = re.compile(r"[^ :\n]|\Z")
_SENTENCE_END = re.compile(r"\n|。|;|\.(?=\s|$)")


def official(text: str, sample: Sample) -> str | None:
    """Extract as the GSM8K repository does: the first number after ``#### ``, its commas removed."""
    del sample
    found = _OFFICIAL.search(text)
    return found.group(1).replace(",", "") if found else None


def is_the_same_text(extracted: str, sample: Sample) -> bool:
    """Compare as the GSM8K repository does: the same characters, commas aside (``18.0`` is not ``18``)."""
    return extracted == sample.answer.replace(",", "")


def strict(text: str, sample: Sample) -> str | None:
    """Extract the number of the last ``The answer is N`` (``答案是 N``), which must follow at once."""
    found = _STRICT.findall(_answered(text, sample))
    return _tidy(found[-1]) if found else None


def flexible(text: str, sample: Sample) -> str | None:
    """Extract the last number of the completion, whatever stands around it."""
    numbers = numbers_in(plain(_answered(text, sample)))
    return numbers[-1] if numbers else None


def decimal(text: str, sample: Sample) -> str | None:
    r"""Extract the number after the last explicit marker, or else the last number.

    A marker without a number in its sentence is passed over for the one before it. Markers are ``####``,
    ``the answer is``, ``答案是`` and the like, and ``\boxed{}``. In the sentence after a marker the result of
    the last equation counts (``18 = 3 x 6`` is 18), else the first number, else one in words. Fractions,
    commas, currency signs, full-width digits, 万 and a final full stop are understood; ``3 x 6`` alone is no
    number.
    """
    text = plain(_answered(text, sample))
    return _stated_number(text) or _last_number(text)


def _answered(text: str, sample: Sample) -> str:
    """Return what answers the question: no prompt repeated before it, no further question behind."""
    return cut_at(without_echo(text, sample), STOPS)


def _stated_number(text: str) -> str | None:
    """Return the number in the sentence behind the last marker that has one there.

    A number that does not follow at once (``The answer is useful to all 3 of you``) gives way to one before
    it behind ``####`` or in a box.
    """
    ends = [end.start() for end in _SENTENCE_END.finditer(text)] + [len(text)]
    # Markers of one sentence share its end. A model that repeats a marker for ever would have all of them
    # read the whole rest, so what a later marker found to hold no number is not read again for those before.
    read_from, read_to, has_equals = len(text), -1, False
    indirect: str | None = None
    for marker in reversed([found for found in _MARKER.finditer(text) if not found["void"]]):
        start = _begin(text, marker.end())
        end = ends[bisect_left(ends, start)]
        has_equals = has_equals and end == read_to
        piece = text[start : read_from if end == read_to else end]
        if found := number_of(piece, is_operand=has_equals):
            is_direct = _AT_ONCE.match(piece) is not None
            if is_direct and (marker["formal"] or indirect is None):
                return found
            indirect = indirect or found
        read_from, read_to, has_equals = start, end, has_equals or "=" in piece
    return indirect


def _last_number(text: str) -> str | None:
    """Return the last number, or what the expression that it ends is said to be equal to."""
    numbers = list(_numbers(text))
    if not numbers:
        return None
    equals = text.rfind("=", 0, numbers[-1].start)
    behind = [number for number in numbers if number.start > equals]
    if equals >= 0 and len(behind) > 1 and _are_joined(text, behind):
        before = [number for number in numbers if number.end <= equals]
        if before and not text[before[-1].end : equals].strip() and not _are_joined(text, before[-2:]):
            return before[-1].value
    return numbers[-1].value


def _begin(text: str, place: int) -> int:
    found = _SENTENCE_BEGIN.search(text, place)
    return len(text) if found is None else found.start()


def number_of(sentence: str, *, is_operand: bool = False) -> str | None:
    """Return the number that a short statement gives, or None.

    Args:
        sentence: the statement.
        is_operand: an equals sign without a number behind it follows the sentence.

    >>> number_of(" 3 + 5 = 8 apples"), number_of("$1,080.00"), number_of("twenty-one"), number_of("十八个")
    ('8', '1080.00', '21', '18')
    """
    # `The answer is 3 + 5 = 8`, `18 = 3 x 6`: the result is the side that is one number.
    sides = [sentence] if is_operand else sentence.split("=")
    has_digits = False
    for side in reversed(sides):
        numbers = list(_numbers(side))
        has_digits = has_digits or bool(numbers)
        if numbers and not _are_joined(side, numbers[:2]):
            return numbers[0].value
    if has_digits:
        return None
    return number_in_words(sentence)


@dataclass(frozen=True, slots=True)
class _Found:
    """A number of a text: ASCII digits with sign and decimal point, or a fraction; and where it stands."""

    value: str
    start: int
    end: int
    is_negative: bool


def _are_joined(text: str, numbers: Sequence[_Found]) -> bool:
    """Say whether numbers that follow each other are the operands of an expression."""
    pairs = list(pairwise(numbers))
    return bool(pairs) and all(_is_operator(text[one.end : two.start], two) for one, two in pairs)


def _is_operator(between: str, after: _Found) -> bool:
    bare = between.strip()
    # The minus of `10 - 5` has been taken for the sign of the 5.
    return bare in {"x", "X", "-", "/"} or (not bare and after.is_negative) or bool(_JOINED.search(bare))


def numbers_in(text: str) -> list[str]:
    """Return all numbers of a plain text in order, as ASCII digits with sign and decimal point.

    >>> numbers_in("-$1,200.50, 3 and 2万"), numbers_in("3/4, 36/2, 2 1/2, 1万2千")
    (['-1200.50', '3', '20000'], ['3/4', '18', '5/2', '12000'])
    """
    return [number.value for number in _numbers(text)]


def _numbers(text: str) -> Iterator[_Found]:
    last, last_scale = None, 0
    for match in _NUMBER.finditer(text):
        scale = _SCALES[match["scale"].lower()] if match["scale"] else 1
        is_negative = bool(match["sign"] or match["minus"])
        for value, start, end in _values(match, text):
            found = _Found(("-" if is_negative else "") + _scaled(value, scale), start, end, is_negative)
            # 1万2千, 3亿5000万: parts of one number.
            if last is not None and last_scale > scale and last.end == start and "/" not in found.value:
                found = dataclasses.replace(
                    last, value=f"{Decimal(last.value) + Decimal(found.value):f}", end=end
                )
            elif last is not None:
                yield last
            last, last_scale = found, scale if match["scale"] and not match["scale"].isascii() else 0
    if last is not None:
        yield last


def _values(match: re.Match[str], text: str) -> list[tuple[str, int, int]]:
    """Return the number of a match; both sides of a slash apart where that is no fraction (1/0)."""
    digits, below, whole = _tidy(match["digits"]), match["below"], match["whole"] or ""
    if below is None:
        return [(digits, match.start(), match.end())]
    is_part = text[max(0, match.start() - 1) : match.start()] == "/"
    is_long = max(len(digits), len(below)) > _LONGEST_FRACTION
    if not is_part and not is_long and Fraction(below):
        value = Fraction(digits) / Fraction(below) + int(whole or 0)
        return [(str(value), match.start(), match.end())]
    apart = [(match.start(), match.end("digits"), digits), (match.start("below"), match.end(), below)]
    return [(value, start, end) for start, end, value in apart]


def _scaled(value: str, scale: int) -> str:
    if scale == 1:
        return value
    if "/" in value:
        return str(Fraction(value) * scale)
    return f"{(Decimal(value) * scale).normalize():f}"


def is_the_same_number(extracted: str, sample: Sample) -> bool:
    """Compare as decimals: 18, 18.0 and 18.00 are the same, as are 1,080 and 1080.

    >>> is_the_same_number("1080.00", Sample("gsm8k", "test", 0, "", answer="1,080"))
    True
    """
    gold = _tidy(sample.answer)
    try:
        if "/" in extracted:
            return Fraction(extracted) == Fraction(gold)
        return Decimal(extracted) == Decimal(gold)
    except (InvalidOperation, ValueError, ZeroDivisionError):
        return False


def _tidy(digits: str) -> str:
    return re.sub(r"[,\s$¥]", "", digits)
