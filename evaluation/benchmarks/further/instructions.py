"""The 25 kinds of instructions of IFEval, each as a check of an answer.

Each check does what ``instruction_following_eval/instructions.py`` of google-research @ 3f357bd does; what
that has of other libraries is here so:

* languages: langdetect, as there, but with a fixed seed (it draws at random: one answer could be judged in
  two ways);
* sentences: NLTK's Punkt algorithm with the abbreviations below, as its trained English model is a download
  of its own;
* words in capitals: NLTK's word tokenizer, inside these sentences.

Patterns of the data are searched for with a bound of time; a search that reaches it counts as not followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import regex

from glmtune.errors import MissingExtraError, unknown_name

Instruction = Mapping[str, Any]
"""``id`` (its kind) and the arguments of that kind."""
EXTRA = "ifeval"
SECONDS = 1.0
"""Longest search of one pattern in one answer."""
LESS, AT_LEAST = "less than", "at least"
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATIONS = (
    *(
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "jr",
        "sr",
        "gen",
        "col",
        "lt",
        "sgt",
        "capt",
        "rep",
        "sen",
        "gov",
    ),
    *(
        "inc",
        "ltd",
        "co",
        "corp",
        "dept",
        "vs",
        "etc",
        "e.g",
        "i.e",
        "a.m",
        "p.m",
        "no",
        "fig",
        "vol",
        "al",
        "est",
    ),
    *(
        "u.s",
        "u.k",
        "d.c",
        "ph.d",
        "m.d",
        "b.a",
        "m.a",
        "approx",
        "rev",
        "hon",
        "jan",
        "feb",
        "mar",
        "apr",
        "jun",
    ),
    *("jul", "aug", "sep", "sept", "oct", "nov", "dec"),
)


def check_extra() -> None:
    """Say early that languages cannot be told.

    Raises:
        MissingExtraError: langdetect is not installed.
    """
    if find_spec("langdetect") is None:
        raise MissingExtraError("Checking languages (benchmark=ifeval)", extra=EXTRA)


def check_known(asked: Sequence[Instruction]) -> None:
    """Check that instructions are of kinds there are, with the arguments of their kind.

    Args:
        asked: of one prompt.

    Raises:
        ValueError: one is not; the message says which and why.
    """
    for each in asked:
        kind = each["id"]
        if kind not in KINDS:
            raise ValueError(unknown_name("`instruction_id_list`", kind, KINDS).rstrip("."))
        for name, accepts in KINDS[kind][0].items():
            if not accepts(each.get(name)):
                raise ValueError(f"`{kind}` has {name}={each.get(name)!r}, which cannot be meant")


def followed(instruction: Instruction, text: str) -> bool:
    """Say whether an answer, as it stands, follows an instruction; an empty one follows none."""
    return bool(text.strip()) and _holds(instruction, text)


def followed_loosely(instruction: Instruction, text: str) -> bool:
    """Say whether an answer, or what is left without its first or last line or its asterisks, follows one."""
    lines = text.split("\n")
    parts = (text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1]))
    stripped = [parts[0], *(part.strip() for part in parts[1:])]
    return any(followed(instruction, form) for part in stripped for form in (part, part.replace("*", "")))


def _holds(instruction: Instruction, text: str) -> bool:
    try:
        return KINDS[instruction["id"]][1](text, instruction)
    except TimeoutError:
        return False


# ---- searching and counting ----


def _search(pattern: str, text: str, flags: int = 0) -> bool:
    return regex.search(pattern, text, flags=flags, timeout=SECONDS) is not None


def _find(pattern: str, text: str, flags: int = 0) -> list[str]:
    return regex.findall(pattern, text, flags=flags, timeout=SECONDS)


def _compares(count: int, asked: int, relation: str) -> bool:
    return count < asked if relation == LESS else count >= asked


@cache
def _sentence_tokenizer() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text.

    >>> sentences("Mr. Fox ran. Did he? He did!")
    ['Mr. Fox ran.', 'Did he?', 'He did!']
    """
    return _sentence_tokenizer().tokenize(text)


def _words(text: str) -> list[str]:
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return [word for sentence in sentences(text) for word in tokenizer.tokenize(sentence)]


def _is_in(language: str, text: str) -> bool:
    """Say whether a text is in a language; one that has none (numbers, marks) is in any, as officially."""
    import langdetect
    from langdetect.lang_detect_exception import LangDetectException

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except LangDetectException:
        return True


# ---- the checks, in the order of the official table ----


def _keywords(text: str, given: Instruction) -> bool:
    return all(_search(keyword, text, regex.IGNORECASE) for keyword in given["keywords"])


def _keyword_frequency(text: str, given: Instruction) -> bool:
    count = len(_find(given["keyword"].strip(), text, regex.IGNORECASE))
    return _compares(count, given["frequency"], given["relation"])


def _forbidden_words(text: str, given: Instruction) -> bool:
    return not any(_search(rf"\b{word}\b", text, regex.IGNORECASE) for word in given["forbidden_words"])


def _letter_frequency(text: str, given: Instruction) -> bool:
    count = text.lower().count(given["letter"].strip().lower())
    return _compares(count, given["let_frequency"], given["let_relation"])


def _language(text: str, given: Instruction) -> bool:
    return _is_in(given["language"], text)


def _number_sentences(text: str, given: Instruction) -> bool:
    return _compares(len(sentences(text)), given["num_sentences"], given["relation"])


def _number_paragraphs(text: str, given: Instruction) -> bool:
    """Paragraphs between ``***``; an empty one counts only at neither end, where it is none that could be."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == given["num_paragraphs"]


def _number_words(text: str, given: Instruction) -> bool:
    return _compares(len(re.findall(r"\w+", text)), given["num_words"], given["relation"])


def _nth_paragraph(text: str, given: Instruction) -> bool:
    """The n-th paragraph between blank lines begins with a word, and there are as many as asked."""
    parts = text.split("\n\n")
    count, place = sum(bool(part.strip()) for part in parts), given["nth_paragraph"]
    if place > count or not (paragraph := parts[place - 1].strip()):
        return False
    first = paragraph.split()[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", first, maxsplit=1)[0].lower()
    return count == given["num_paragraphs"] and word == given["first_word"].lower()


def _placeholders(text: str, given: Instruction) -> bool:
    return len(_find(r"\[.*?\]", text)) >= given["num_placeholders"]


def _postscript(text: str, given: Instruction) -> bool:
    marker = str(given["postscript_marker"]).strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return _search(patterns.get(marker, marker.lower()), text.lower())


def _bullets(text: str, given: Instruction) -> bool:
    starred = _find(r"^\s*\*[^\*].*$", text, regex.MULTILINE)
    dashed = _find(r"^\s*-.*$", text, regex.MULTILINE)
    return len(starred) + len(dashed) == given["num_bullets"]


def _constrained(text: str, given: Instruction) -> bool:
    del given
    return any(option in text for option in CONSTRAINED)


def _highlights(text: str, given: Instruction) -> bool:
    single = (found.strip("*").strip() for found in _find(r"\*[^\n\*]*\*", text))
    double = (
        found.removeprefix("**").removesuffix("**").strip() for found in _find(r"\*\*[^\n\*]*\*\*", text)
    )
    return sum(map(bool, single)) + sum(map(bool, double)) >= given["num_highlights"]


def _sections(text: str, given: Instruction) -> bool:
    mark = given["section_spliter"].strip()
    return len(_find(rf"\s?{mark}\s?\d+\s?", text)) >= given["num_sections"]


def _json(text: str, given: Instruction) -> bool:
    del given
    bare = text.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        bare = bare.removeprefix(opening)
    try:
        json.loads(bare.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Instruction) -> bool:
    del given
    return any(title.lstrip("<").rstrip(">").strip() for title in _find(r"<<[^\n]+>>", text))


def _two_responses(text: str, given: Instruction) -> bool:
    del given
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    said = [part for part in parts if part]
    return len(said) == 2 and said[0] != said[1]


def _repeat_prompt(text: str, given: Instruction) -> bool:
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _end(text: str, given: Instruction) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _capital_words(text: str, given: Instruction) -> bool:
    count = sum(word.isupper() for word in _words(text))
    return _compares(count, given["capital_frequency"], given["capital_relation"])


def _capital(text: str, given: Instruction) -> bool:
    del given
    return text.isupper() and _is_in("en", text)


def _lowercase(text: str, given: Instruction) -> bool:
    del given
    return text.islower() and _is_in("en", text)


def _no_comma(text: str, given: Instruction) -> bool:
    del given
    return "," not in text


def _quotation(text: str, given: Instruction) -> bool:
    del given
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


# ---- arguments ----


def _count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _place(value: object) -> bool:
    return _count(value) and isinstance(value, int) and value >= 1


def _relation(value: object) -> bool:
    return value in (LESS, AT_LEAST)


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _character(value: object) -> bool:
    return isinstance(value, str) and len(value) == 1


def _pattern(value: object) -> bool:
    """Keywords of the data are searched for as patterns, as officially."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        regex.compile(value)
    except regex.error:
        return False
    return True


def _patterns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_pattern, value))


Arguments = Mapping[str, Callable[[object], bool]]
Check = Callable[[str, Instruction], bool]
KINDS: Mapping[str, tuple[Arguments, Check]] = {
    "keywords:existence": ({"keywords": _patterns}, _keywords),
    "keywords:frequency": (
        {"keyword": _pattern, "frequency": _count, "relation": _relation},
        _keyword_frequency,
    ),
    "keywords:forbidden_words": ({"forbidden_words": _patterns}, _forbidden_words),
    "keywords:letter_frequency": (
        {"letter": _character, "let_frequency": _count, "let_relation": _relation},
        _letter_frequency,
    ),
    "language:response_language": ({"language": _text}, _language),
    "length_constraints:number_sentences": (
        {"num_sentences": _count, "relation": _relation},
        _number_sentences,
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": _count}, _number_paragraphs),
    "length_constraints:number_words": ({"num_words": _count, "relation": _relation}, _number_words),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": _count, "nth_paragraph": _place, "first_word": _text},
        _nth_paragraph,
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": _count}, _placeholders),
    "detectable_content:postscript": ({"postscript_marker": _pattern}, _postscript),
    "detectable_format:number_bullet_lists": ({"num_bullets": _count}, _bullets),
    "detectable_format:constrained_response": ({}, _constrained),
    "detectable_format:number_highlighted_sections": ({"num_highlights": _count}, _highlights),
    "detectable_format:multiple_sections": ({"section_spliter": _pattern, "num_sections": _count}, _sections),
    "detectable_format:json_format": ({}, _json),
    "detectable_format:title": ({}, _title),
    "combination:two_responses": ({}, _two_responses),
    "combination:repeat_prompt": ({"prompt_to_repeat": _text}, _repeat_prompt),
    "startend:end_checker": ({"end_phrase": _text}, _end),
    "change_case:capital_word_frequency": (
        {"capital_frequency": _count, "capital_relation": _relation},
        _capital_words,
    ),
    "change_case:english_capital": ({}, _capital),
    "change_case:english_lowercase": ({}, _lowercase),
    "punctuation:no_comma": ({}, _no_comma),
    "startend:quotation": ({}, _quotation),
}
"""Kind to its arguments, each with what it may be, and its check."""
