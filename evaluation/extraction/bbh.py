"""Rules that find the answer to a BIG-Bench Hard item, and the forms its answers take task by task.

Seven forms cover the 27 files: letters, three pairs of words, integers, brackets, word lists. ``official``
compares character by character and is what published figures rest on; ``normalized`` reads the same stated
answer in the form of the task (``the answer is B.`` for ``(B)``); ``loose`` also reads a last line that
states nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from evaluation.extraction.numbers import number_of, numbers_in
from evaluation.extraction.text import RUN_ON, cut_at, plain, without_echo
from evaluation.sample import Sample

STOPS = ("\nQ:",)
_OFFICIAL_CUE = "the answer is "
_CUE = re.compile(
    r"(?i:answer(?:\s+(?:to the question|here))?\s*(?:\bis\b|:|=)|####|答案(?:应该)?(?:是|为|:))"
    r"(?i:\s*(?:option|choice|therefore|thus|that|:))*[\s:]*"
)
# What stands before a cue. Where it is all that stands behind another, that one states nothing: a completion
# that is cut at `So the answer is` has said it before, if at all.
_LEADING = r"[\s.:,*]*(?:(?i:\bso|\bthus|\btherefore|\bhence)[\s,]*)?(?:(?i:\bthe|\bfinal|\bcorrect)\s*)*"
_NOTHING = re.compile(_LEADING)
_BEFORE_CUE = re.compile(_LEADING + r"\Z")
_LONGEST_LEADING = 60
_OPTION = re.compile(r"^\(([A-R])\) (.*)$", re.MULTILINE)
# `The answer is A good question` and `... I think` begin with words, not with options A and I.
_NO_LETTER = r"(?:A (?!is\b|because\b|since\b|as\b|for\b|and\b|or\b)|I )[a-z]"
_LETTER = re.compile(
    rf"[\s\"'“(\[{{$]*(?:[Oo]ption\s*)?(?:[(\[]([A-Ra-r])[)\]]|(?!{_NO_LETTER})([A-R])(?![A-Za-z0-9'])"
    # Small letters are words, too, unless nothing follows: `the answer is b.`
    r"|([a-r])(?=[.\"'”)*]*\s*(?:\n|$)))"
)
_BRACKETED = re.compile(r"\(([A-R])\)")
# `not valid` comes before `valid`: the first alternative that matches decides.
_WORD = {
    "yes_no": re.compile(r"(?i:\b(yes|no)\b)"),
    "true_false": re.compile(r"(?i:\b(true|false)\b)"),
    "valid_invalid": re.compile(r"(?i:\b(invalid|not (?:deductively )?valid|valid)\b)"),
}
_NOT_BRACKETS = re.compile(r"[^()\[\]{}<>]+")


def _letter(tail: str, sample: Sample) -> str | None:
    if found := _LETTER.match(tail):
        return f"({found[found.lastindex or 0].upper()})"
    said = _simple(tail)
    # Three items have the text of an option as their target, although all others of their tasks have its
    # letter.
    is_written_out = _BRACKETED.fullmatch(sample.answer) is None
    if is_written_out and said == _simple(sample.answer):
        return sample.answer
    options = {_simple(text): f"({letter})" for letter, text in _OPTION.findall(sample.question)}
    if said in options:
        return options[said]
    found = _BRACKETED.search(tail.splitlines()[0]) if tail else None
    return f"({found.group(1)})" if found else None


def _simple(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return first.strip(" \"'“”().。").casefold()


def _word(kind: str) -> Callable[[str, Sample], str | None]:
    def find(tail: str, sample: Sample) -> str | None:
        del sample
        found = _WORD[kind].search(tail.splitlines()[0]) if tail else None
        if not found:
            return None
        word = found.group(1).casefold()
        return "invalid" if word.startswith("not") else word

    return find


def _integer(tail: str, sample: Sample) -> str | None:
    del sample
    found = number_of(tail.splitlines()[0]) if tail else None
    return found.removesuffix(".0") if found else None


def _bracket_string(tail: str, sample: Sample) -> str | None:
    del sample
    marks = _NOT_BRACKETS.sub("", tail.splitlines()[0]) if tail else ""
    return " ".join(marks) or None


def _word_list(tail: str, sample: Sample) -> str | None:
    del sample
    lines = tail.splitlines()
    # A numbered list goes over several lines; any other answer is on the first, and prose may follow.
    if len(lines) > 1 and re.match(r"\s*(?:\d+[.)]|[-*])\s", tail):
        tail = " ".join(re.sub(r"^\s*(?:\d+[.)]|[-*])\s*", "", line) for line in lines)
    else:
        tail = lines[0] if lines else ""
    words = re.sub(r"[,;<>\"“”\[\]]|(?<!\w)'|'(?!\w)|(?<!\d)\d++[.)]\s", " ", tail.casefold()).split()
    if words:
        words[-1] = words[-1].rstrip(".")
    return " ".join(words) or None


FORMS: Mapping[str, Callable[[str, Sample], str | None]] = {
    "letter": _letter,
    "yes_no": _word("yes_no"),
    "true_false": _word("true_false"),
    "valid_invalid": _word("valid_invalid"),
    "integer": _integer,
    "brackets": _bracket_string,
    "words": _word_list,
}
# What a whole completion must look like to be taken for an answer where it has no cue (``official``).
_WHOLE = {
    "letter": re.compile(r"\([A-R]\)"),
    "yes_no": re.compile("[Yy]es|[Nn]o"),
    "true_false": re.compile("True|False"),
    "valid_invalid": re.compile("valid|invalid"),
    "integer": re.compile(r"-?\d+"),
    "brackets": re.compile(r"[()\[\]{}<>]( [()\[\]{}<>])*"),
    "words": re.compile(r"[^\sA-Z:]+( [^\sA-Z:]+)*"),
}


def official(kind: str) -> Callable[[str, Sample], str | None]:
    """Return the rule that reproduces the published accuracies of Suzgun et al. for chains of thought.

    The text after the first ``the answer is ``, its first line, stripped, less one final full stop; compared
    character by character. Without the cue the whole text is the answer, if it has an answer's form at all.

    Args:
        kind: of the task's targets; a key of ``FORMS``.
    """

    def extract(text: str, sample: Sample) -> str | None:
        del sample
        before, cue, tail = text.partition(_OFFICIAL_CUE)
        if not cue:
            whole = before.strip()
            return whole if "\n" not in whole and _WHOLE[kind].fullmatch(whole) else None
        return tail.split("\n", 1)[0].strip().removesuffix(".") or None

    return extract


def official_direct(text: str, sample: Sample) -> str | None:
    """Return the whole completion, stripped: what answer-only prompts are scored by."""
    del sample
    return text.strip() or None


def normalized_direct(kind: str) -> Callable[[str, Sample], str | None]:
    """Return the rule that reads an answer-only completion in the form of the task's targets.

    Args:
        kind: of the task's targets; a key of ``FORMS``.
    """

    def extract(text: str, sample: Sample) -> str | None:
        return FORMS[kind](_prepared(text, kind, sample).strip(), sample)

    return extract


def normalized(kind: str) -> Callable[[str, Sample], str | None]:
    """Return the rule that reads the last stated answer in the form of the task's targets.

    ``(B)``, ``B``, ``B.``, ``**(B) text**`` and the text of option B are all ``(B)``; yes, no, true, false
    and numbers in words in any case; brackets without anything between; word lists with commas.

    Args:
        kind: of the task's targets; a key of ``FORMS``.
    """

    def extract(text: str, sample: Sample) -> str | None:
        text = _prepared(text, kind, sample)
        stated = _last_statement(text)
        return None if stated is None else FORMS[kind](stated.strip(), sample)

    return extract


def _last_statement(text: str) -> str | None:
    """Return what stands behind the last cue that anything stands behind."""
    end = len(text)
    for cue in reversed(list(_CUE.finditer(text))):
        is_long = end - cue.end() > _LONGEST_LEADING
        if is_long or not _NOTHING.fullmatch(text, cue.end(), end):
            stated = text[cue.end() : end]
            if end == len(text):
                return stated
            place = max(0, len(stated) - _LONGEST_LEADING)
            return stated[:place] + _BEFORE_CUE.sub("", stated[place:])
        end = cue.start()
    return None


def loose(kind: str) -> Callable[[str, Sample], str | None]:
    """Return the rule that, where no answer is stated, takes the last line with something of its form.

    Args:
        kind: of the task's targets; a key of ``FORMS``.
    """
    stated = normalized(kind)

    def extract(text: str, sample: Sample) -> str | None:
        if found := stated(text, sample):
            return found
        lines = _prepared(text, kind, sample).strip().splitlines()
        if not lines:
            return None
        if kind == "letter":
            letters = _BRACKETED.findall(lines[-1])
            return f"({letters[-1]})" if letters else _letter(lines[-1], sample)
        if kind == "integer":
            numbers = numbers_in(lines[-1])
            return numbers[-1] if numbers else None
        if kind in _WORD:
            words = _WORD[kind].findall(lines[-1])
            return FORMS[kind](words[-1], sample) if words else None
        return FORMS[kind](lines[-1], sample)

    return extract


def _prepared(text: str, kind: str, sample: Sample) -> str:
    text = cut_at(without_echo(text, sample), RUN_ON)
    if kind == "brackets":
        # Not ``plain``: NFKC and the LaTeX rules would change the very characters that are the answer.
        return text.replace("**", "").replace("`", "").replace("$", "")
    return plain(text)


def is_the_same_answer(extracted: str, sample: Sample) -> bool:
    """Compare whatever the case of the letters (targets are ``Yes``, ``yes``, ``True``, ``invalid``, ...)."""
    return extracted.casefold() == sample.answer.casefold()
