"""Answers of a megabyte, made to be slow: every rule and metric stays linear in their length.

Bounds are generous, since a quadratic rule takes hours where a linear one takes seconds.
"""

from __future__ import annotations

import time

import pytest

from evaluation.extraction import bbh, letters, numbers
from evaluation.extraction.text import plain, without_echo, without_thinking
from evaluation.sample import Sample
from glmtune.metrics.text import score_row
from glmtune.models.templates import responses

MEGABYTE = 1_000_000
SECONDS = 60.0
"""For all texts of a rule together, on a machine that does other things beside."""
PATTERNS = {
    "digits": "1",
    "commas": ",",
    "digits and commas": "1,",
    "thousands": "123,",
    "blanks in numbers": "123 ",
    "markers": "The answer is ",
    "Chinese markers": "答案",
    "cues": "所以答案是",
    "sentences": "所以答案是A。",
    "hashes": "#",
    "choices": "choice ",
    "chosen": "选",
    "brackets": "(",
    "boxes": "\\boxed{",
    "boxed": "\\boxed{a}",
    "braces": "{}",
    "spaces": " ",
    "newlines": "\n",
    "numbered lines": "1. a\n",
    "dollars": "$",
    "minus": "- ",
    "colons": ":",
    "numerals": "三",
    "units": "十百",
    "letters": "A",
    "rejected": "不选A、",
    "not": "not A, ",
    "options": "A) ",
    "equations": "1=",
    "words": "twenty-",
    "fractions": "3/",
    "whole fractions": "2 1/2 ",
    "LaTeX fractions": "\\frac{1}{2}",
    "half fractions": "\\frac{",
    "negatives": "minus ",
    "products": "3 x ",
    "parts of a number": "3万",
    "numerals of scale": "万亿",
    "bare answers": "the answer ",
    "thinking": "<think>",
    "thoughts": "<think>a</think>",
    "ends of thinking": "</think>",
    "further questions": "Q?\n\nA. a\nB. b\n",
    "empty cues": "So the answer is. ",
    "marks": "\u0301\u0327",
    "surrogates": "\ud800",
}
QUESTION = "Which?\nOptions:\n(A) foo\n(B) bar"
SAMPLE = Sample("quiz", "law", 0, QUESTION, ("foo", "bar", "baz", "qux"), answer="A")
RULES = {
    **{f"numbers.{name}": getattr(numbers, name) for name in ("official", "strict", "flexible", "decimal")},
    **{f"letters.{name}": getattr(letters, name) for name in ("script", "strict", "loose")},
    **{
        f"bbh.{rule}.{kind}": getattr(bbh, rule)(kind)
        for rule in ("official", "normalized", "loose", "normalized_direct")
        for kind in bbh.FORMS
    },
}
BEGINNINGS = ("", "The answer is ", "答案是")


def texts(size: int) -> list[str]:
    """Every pattern up to a size: alone, behind cues, and with an end that fits nothing."""
    bodies = [(pattern * (size // len(pattern) + 1))[:size] for pattern in PATTERNS.values()]
    return [begin + body + "!" for body in bodies for begin in BEGINNINGS]


def seconds_of(read, found: list[str]) -> float:
    began = time.perf_counter()
    for text in found:
        read(text)
    return time.perf_counter() - began


@pytest.mark.parametrize("rule", ["numbers.decimal", "letters.loose", "letters.script", "bbh.loose.words"])
def test_rules_that_were_quadratic_take_long_answers(rule):
    # 100 KB took them 100 s a text before (`####` repeated), a cubic one (colons) half a day.
    assert seconds_of(lambda text: RULES[rule](text, SAMPLE), texts(MEGABYTE // 50)) < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_a_megabyte(rule):
    # Each pattern behind one of the beginnings in turn: behind all of them is for the shorter ones above.
    some = [text for place, text in enumerate(texts(MEGABYTE)) if place % 3 == place // 3 % 3]
    assert len(some) == len(PATTERNS)
    assert seconds_of(lambda text: RULES[rule](text, SAMPLE), some) < 10 * SECONDS


def test_thinking_and_echoes_are_cut_in_one_pass():
    echo = Sample("quiz", "law", 0, "Q" * 1000, ("foo", "bar", "baz", "qux"))
    found = [pattern * (MEGABYTE // len(pattern)) for pattern in PATTERNS.values()]
    assert seconds_of(without_thinking, found) < SECONDS
    assert seconds_of(lambda text: without_echo("Q:" + text, echo), [*found, "Q" * MEGABYTE]) < SECONDS


def test_a_question_of_blanks_has_options():
    padded = Sample("quiz", "law", 0, f"Which?\n(A) foo{' ' * 100_000}x\n(B) bar", answer="(B)")
    assert seconds_of(lambda text: RULES["bbh.loose.letter"](text, padded), ["the answer is bar"]) < SECONDS


def test_heaps_of_combining_marks_are_read_as_far_as_languages_have_them():
    assert seconds_of(plain, ["答案是e" + "\u0301\u0327" * MEGABYTE + " B"]) < SECONDS
    assert plain("é\u0301答案是Ｂ") == "é\u0301答案是B"


@pytest.mark.parametrize(
    "call", ["[" * 100_000, "f(" * 100_000, "-" * 90_000, "f(a=" + "(" * 50_000, "f(" + "9" * 5_000 + ")"]
)
def test_calls_nested_too_deeply_are_no_calls(call):
    assert responses.read_json_parameters(call) is None
    assert responses.read_python_parameters(f"```python\n{call}\n```") is None


@pytest.mark.parametrize("pattern", ["龘", "1", "好 ", "\n1", "\ud800"])
def test_metrics_take_long_texts_on_both_sides(pattern):
    text = (pattern * 20_000)[:20_000]
    assert seconds_of(lambda prediction: score_row(prediction, text[::-1]), [text]) < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["龘", "1", "好 ", "\n1", "\ud800"])
def test_metrics_take_a_megabyte(pattern):
    text = (pattern * MEGABYTE)[:MEGABYTE]
    assert seconds_of(lambda prediction: score_row(prediction, text[::-1]), [text]) < 10 * SECONDS
