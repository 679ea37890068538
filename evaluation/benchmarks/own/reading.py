"""How answers of a described benchmark are read and compared with their keys."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import regex

from evaluation.benchmarks.own.description import GRADED, Description, ExtractPart
from evaluation.extraction import letters, many_letters, numbers, overlap
from evaluation.sample import LETTERS, Sample
from evaluation.task import SCORES, Rule
from glmtune.errors import DataError

PATTERN_SECONDS = 1.0
"""Longest search of a user's expression in one answer: some expressions take for ever on some texts."""
ANY = "\x1f"
"""Between the keys of which one is enough; no text has it."""
OPTIONS = "official"
"""Rule of the letters' probabilities, named as in the built-in benchmarks."""


def rules_of(
    description: Description, path: Any, lines: dict[str, int], *, num_options: int = 0
) -> dict[str, Rule]:
    """Return the rules of a description, the one that decides first; they are tried on its tests.

    Args:
        description: what the file says.
        path: of the file, for errors.
        lines: key → its line.
        num_options: most that a question has; its tests are read as answers to one with so many.

    Raises:
        DataError: an expression is none or has no group, or a test finds something else.
    """
    if description.kind == "choices":
        return {OPTIONS: Rule("the most probable of the letters", letters.given, reads=SCORES)}
    part = description.extract or ExtractPart(rule="letter" if description.options is not None else "whole")
    line = lines.get("extract")
    extract = _extractor(part, path, line)
    for number, test in enumerate(part.tests):
        found = extract(test.text, Sample("", "", 0, "", choices=("",) * num_options))
        if found != test.finds:
            raise DataError(
                f"`extract.tests[{number}]` is to find {test.finds!r} in {test.text!r}, but the rule finds "
                f"{found!r}. Correct one of them.",
                path=path,
                line=line,
            )
    # What is kept are answers; results are compared only if they were read alike.
    digest = hashlib.sha256(f"{part.rule}|{part.pattern}|{description.score}".encode()).digest()
    version = int.from_bytes(digest[:3], "big")
    name = part.rule or "pattern"
    if description.score in GRADED:
        about = f"{name}, graded: {description.score}"
        return {name: Rule(about, extract, version=version, grade=_grader(description.score))}
    rule = Rule(
        f"{name}, compared: {description.score}", extract, _matcher(description.score), version=version
    )
    if description.kind == "both":
        return {OPTIONS: Rule("the most probable of the letters", letters.given, reads=SCORES), name: rule}
    return {name: rule}


def _extractor(part: ExtractPart, path: Any, line: int | None) -> Callable[[str, Sample], str | None]:
    if part.rule is not None:
        return _NAMED[part.rule]
    assert part.pattern is not None
    try:
        pattern = regex.compile(part.pattern)
    except regex.error as error:
        raise DataError(
            f"`extract.pattern` is no regular expression ({error}).", path=path, line=line
        ) from None
    if pattern.groups < 1:
        raise DataError(
            f"`extract.pattern` is `{part.pattern}`, which has no group: put brackets around the answer.",
            path=path,
            line=line,
        )

    def last_match(text: str, _: Sample) -> str | None:
        try:
            found = [
                match[1] for match in pattern.finditer(text, timeout=PATTERN_SECONDS) if match[1] is not None
            ]
        except TimeoutError:
            return None  # counted as an answer that could not be read
        return found[-1].strip() if found else None

    return last_match


def _line(place: int) -> Callable[[str, Sample], str | None]:
    def one_line(text: str, _: Sample) -> str | None:
        written = [line.strip() for line in text.splitlines() if line.strip()]
        return written[place] if written else None

    return one_line


def _whole(text: str, _: Sample) -> str | None:
    return text.strip() or None


def _letter(text: str, sample: Sample) -> str | None:
    if len(sample.choices) <= len(LETTERS):
        return letters.loose(text, sample)
    return many_letters.loose(text, sample)


_NAMED: dict[str, Callable[[str, Sample], str | None]] = {
    "number": numbers.decimal,
    "letter": _letter,
    "first_line": _line(0),
    "last_line": _line(-1),
    "whole": _whole,
}


def _matcher(score: str) -> Callable[[str, Sample], bool]:
    return {"exact": _exact, "ignore_case": _ignoring_case, "number": _number, "any_of": _any_of}[score]


def _grader(score: str) -> Callable[[str, Sample], float]:
    """Return what grades an answer against a key, or against the nearest of several."""
    grade = {"rouge_l": overlap.rouge_l, "bleu": overlap.bleu, "f1": overlap.f1}[score]
    return lambda extracted, sample: max(grade(extracted, key) for key in sample.answer.split(ANY))


def _exact(extracted: str, sample: Sample) -> bool:
    return extracted.strip() == sample.answer.strip()


def _ignoring_case(extracted: str, sample: Sample) -> bool:
    return _bare(extracted) == _bare(sample.answer)


def _number(extracted: str, sample: Sample) -> bool:
    return numbers.is_the_same_number(extracted.replace(",", ""), sample)


def _any_of(extracted: str, sample: Sample) -> bool:
    return _bare(extracted) in [_bare(key) for key in sample.answer.split(ANY)]


def _bare(text: str) -> str:
    """Return a text without blanks and full stops around it, case left out."""
    return re.sub(r"^[\s.。]+|[\s.。]+$", "", text).casefold()
