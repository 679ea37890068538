"""Numbers written in words: English up to ninety-nine, Chinese of any size."""

from __future__ import annotations

import re
from fractions import Fraction

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
          "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
          "nineteen", "twenty")  # fmt: skip
_TENS = {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_ENGLISH = {word: value for value, word in enumerate(_WORDS)} | _TENS
_ENGLISH_NUMBER = re.compile(rf"(?i:\b({'|'.join(_ENGLISH)})(?:[- ]({'|'.join(_WORDS[1:10])}))?\b)")
_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_SCALES = {"万": 10**4, "亿": 10**8}
_WORD = "[" + "".join([*_DIGITS, *_UNITS, *_SCALES]) + "]"
# 一共 and the like hold no number; 百分之二十 is 20, as 20 % is.
_NO_NUMBER = r"一(?:共|起|样|定|般|些|直|下|旦|边|半)|百分之"
_CHINESE_NUMBER = re.compile(
    rf"(?P<minus>负)?(?!{_NO_NUMBER})(?P<word>{_WORD}+)"
    rf"(?:分之(?P<above>{_WORD}++)|点(?P<places>[{''.join(_DIGITS)}]++))?"
)
_LONGEST = 40
"""Characters of a Chinese number; what is longer is none."""


def number_in_words(sentence: str) -> str | None:
    """Return the first number in words, English before Chinese, as digits or a fraction; None without one.

    >>> [number_in_words(text) for text in ("twenty-one", "一万二千个", "三分之二", "一点五", "一共十八")]
    ['21', '12000', '2/3', '1.5', '18']
    """
    if word := _ENGLISH_NUMBER.search(sentence):
        tens, ones = (_ENGLISH.get((part or "").lower(), 0) for part in word.groups())
        return str(tens + ones)
    found = _CHINESE_NUMBER.search(sentence)
    if found is None:
        return None
    whole, above, places = found["word"], found["above"] or "", found["places"] or ""
    if max(len(whole), len(above), len(places)) > _LONGEST:
        return None
    value = str(_whole(whole))
    if above:
        if value == "0":
            return None
        value = str(Fraction(_whole(above), int(value)))
    if places:
        value += "." + "".join(str(_DIGITS[character]) for character in places)
    return f"-{value}" if found["minus"] else value


def _whole(word: str) -> int:
    """Read a whole number.

    十八 has no digit before its unit, which then counts once; a last digit right behind a unit is of the next
    smaller one (一万二 is 12,000); digits without any unit are read one by one (二〇二四).
    """
    for sign, scale in sorted(_SCALES.items(), key=lambda item: -item[1]):
        before, found, rest = word.rpartition(sign)
        if found:
            return (_whole(before) if before else 1) * scale + _after(rest, scale)
    if not any(sign in word for sign in _UNITS):
        return int("".join(str(_DIGITS[character]) for character in word) or "0")
    total, digit, unit = 0, 0, 1
    for character in word:
        if character in _UNITS:
            unit = _UNITS[character]
            total, digit = total + (digit or 1) * unit, 0
        else:
            digit = _DIGITS[character]
            # 三百零五: with 零 the digit is of the ones.
            unit = unit if digit else 1
    return total + digit * max(1, unit // 10)


def _after(rest: str, scale: int) -> int:
    return _whole(rest) * (scale // 10 if len(rest) == 1 and rest in _DIGITS else 1)
