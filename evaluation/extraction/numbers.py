"""Rules that find the number a word problem ends in (GSM8K, MGSM), and compare numbers as decimals.

``official`` and ``strict`` fail where the model words its answer otherwise, ``flexible`` takes whatever
number comes last (``The answer is 18. She checks it: 18 - 9 = 9.`` is 9 for it), so the deciding rule is
``decimal``: the number of the last stated answer, compared by value. Completions quoted below are cases of
``tests/evaluation/extraction/extraction_cases.json``.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from evaluation.extraction.text import cut_at, plain
from evaluation.sample import Sample

# Where a model begins a question of its own; a completion is over there.
STOPS = ("\nQ:", "\nQuestion:", "\n问题:", "\n问题：", "\n问：")

_OFFICIAL = re.compile(r"#### (-?[0-9.,]+)")
_STRICT = re.compile(r"(?:[Tt]he answer is|答案是)[ :：]*(-?[$¥]?-?[0-9][0-9,]*(?:\.[0-9]+)?)")
# `答` counts only as a label (`答：小明还剩18个苹果`), since it is part of many words.
_MARKER = re.compile(
    r"####|(?i:\bfinal answer\b|\bthe answer\b|\banswer\s*(?:is|:|=))"
    r"(?:\s*(?:(?i:is|are|was|equals|would be)|:|=))*"
    r"|答案(?:应该|应当|应)?(?:是|为|等于|:|=)*|答(?=:):"
)
_MONEY = r"(?:US\$|RMB|[$¥€£])?"
# In this order: `70,000`; `1 000` (a blank before every three digits, and nothing behind: `1 200 apples` may
# be the end of a list); plain digits; `.75`.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:\s\d{3})+(?![\d,]|\.\d|\s?[a-z])|\d+)(?:\.\d+)?|\.\d+"
# A minus is a sign only where no number or bracket stands before it: `10-5=5` ends in 5, `-$5` and `$-5` are
# -5.
_NUMBER = re.compile(
    rf"(?<![\d.])(?P<sign>(?<![\w)\]])-\s?)?{_MONEY}\s?(?P<minus>-)?(?P<digits>{_DIGITS})"
    r"\s?(?P<scale>万|亿|million\b|billion\b|thousand\b)?"
)
_SCALES = {"万": 10**4, "亿": 10**8, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SENTENCE_END = re.compile(r"\n|。|;|\.(?=\s|$)")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
          "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
          "nineteen", "twenty")  # fmt: skip
_TENS = {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_ENGLISH = {word: value for value, word in enumerate(_WORDS)} | _TENS
_ENGLISH_NUMBER = re.compile(rf"(?i:\b({'|'.join(_ENGLISH)})(?:[- ]({'|'.join(_WORDS[1:10])}))?\b)")
_CHINESE_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {
    "两": 2,
    "〇": 0,
}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_NUMBER = re.compile("[零〇一二两三四五六七八九十百千]+")


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
    del sample
    found = _STRICT.findall(cut_at(text, STOPS))
    return _tidy(found[-1]) if found else None


def flexible(text: str, sample: Sample) -> str | None:
    """Extract the last number of the completion, whatever stands around it."""
    del sample
    numbers = numbers_in(plain(cut_at(text, STOPS)))
    return numbers[-1] if numbers else None


def decimal(text: str, sample: Sample) -> str | None:
    r"""Extract the number after the last explicit marker, or else the last number.

    A marker without a number in its sentence is passed over for the one before it. Markers are ``####``,
    ``the answer is``, ``答案是`` and the like, and ``\boxed{}``. In the sentence after a marker the last
    equation's result counts, else the first number, else a number in words. Commas, currency signs,
    full-width digits, 万 and a final full stop are understood.
    """
    text = plain(cut_at(text, STOPS))
    for marker in reversed(list(_MARKER.finditer(text))):
        tail = text[marker.end() :].lstrip(" :\n")
        sentence = tail[: end.start()] if (end := _SENTENCE_END.search(tail)) else tail
        if found := number_of(sentence):
            return found
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def number_of(sentence: str) -> str | None:
    """Return the number that a short statement gives, or None.

    >>> number_of(" 3 + 5 = 8 apples"), number_of("$1,080.00"), number_of("twenty-one"), number_of("十八个")
    ('8', '1080.00', '21', '18')
    """
    # `The answer is 3 + 5 = 8`: the result stands behind the last equals sign, the operands before it.
    before, equals, result = sentence.rpartition("=")
    if equals and (numbers := numbers_in(result)):
        return numbers[0]
    if numbers := numbers_in(before or sentence):
        return numbers[0]
    if word := _ENGLISH_NUMBER.search(sentence):
        tens, ones = (_ENGLISH.get((part or "").lower(), 0) for part in word.groups())
        return str(tens + ones)
    chinese = _CHINESE_NUMBER.search(sentence)
    return str(_chinese(chinese.group())) if chinese else None


def numbers_in(text: str) -> list[str]:
    """Return all numbers of a plain text in order, as ASCII digits with sign and decimal point.

    >>> numbers_in("-$1,200.50, 3 and 2万")
    ['-1200.50', '3', '20000']
    """
    found = []
    for match in _NUMBER.finditer(text):
        value = ("-" if match["sign"] or match["minus"] else "") + _tidy(match["digits"])
        if match["scale"]:
            scaled = Decimal(value) * _SCALES[match["scale"].lower()]
            value = f"{scaled.normalize():f}"
        found.append(value)
    return found


def is_the_same_number(extracted: str, sample: Sample) -> bool:
    """Compare as decimals: 18, 18.0 and 18.00 are the same, as are 1,080 and 1080.

    >>> is_the_same_number("1080.00", Sample("gsm8k", "test", 0, "", answer="1,080"))
    True
    """
    try:
        return Decimal(extracted) == Decimal(_tidy(sample.answer))
    except InvalidOperation:
        return False


def _tidy(digits: str) -> str:
    return re.sub(r"[,\s$¥]", "", digits)


def _chinese(word: str) -> int:
    """Read a number below ten thousand; 十八 has no digit before its unit, which then counts once."""
    total, digit = 0, 0
    for character in word:
        if character in _CHINESE_UNITS:
            total += (digit or 1) * _CHINESE_UNITS[character]
            digit = 0
        else:
            digit = _CHINESE_DIGITS[character]
    return total + digit
