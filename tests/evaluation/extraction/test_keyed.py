"""Keys of the exam are found in what models of all kinds write, and not in what only looks like them."""

from __future__ import annotations

import pytest

from evaluation.extraction.keyed import extract, is_right
from evaluation.sample import Sample


def judged(rule: str, key: str, said: str, *, choices: tuple[str, ...] = ()) -> bool | None:
    """Whether an answer is right; None where nothing was found in it."""
    sample = Sample("exam", "facts_en", 0, "What?", choices, key, rule=rule)
    found = extract(said, sample)
    return None if found is None else is_right(found, sample)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("巴黎|Paris", "法国的首都是巴黎。"),
        ("巴黎|Paris", "The capital is **Paris**."),
        ("Paris", "PARIS!"),
        ("H2O", "The formula is H₂O."),
        ("H2O", r"It is $\text{H}_{2}\text{O}$."),
        ("Co", "钴的符号是Co。"),
        ("7|七", "一周有7天"),
        ("7|七", "一周有七天"),
        ("hat|Hat|hats", "Hat."),
        ("10月1日|10月1号", "国庆节是１０月１日。"),
        ("Leonardo|da Vinci", "It was painted by Leonardo da Vinci."),
    ],
)
def test_forms_that_are_there(key: str, said: str) -> None:
    assert judged("contains", key, said) is True


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("巴黎|Paris", "The capital is Lyon."),
        ("C", "The symbol is Cu."),
        ("Co", "The formula is CO."),
        ("He", "he is here"),
        ("2", "A dozen has 12."),
        ("10月1日", "那天是10月11日"),
        ("Paris", "It is Berlin.\nQ: And of France?\nA: Paris."),
    ],
)
def test_forms_that_only_seem_to_be_there(key: str, said: str) -> None:
    assert judged("contains", key, said) is False


def test_reports_show_what_was_said_instead() -> None:
    sample = Sample("exam", "facts_en", 0, "What?", answer="Paris", rule="contains")
    assert extract(" It is Lyon. " + "x" * 200, sample) == ("It is Lyon. " + "x" * 200)[:80]
    assert extract("Paris, of course", sample) == "Paris"
    assert extract("  ", sample) is None


def test_numbers_are_compared_by_value() -> None:
    assert judged("number", "42", "17+25=42，答案是 42。") is True
    assert judged("number", "42", "The answer is 42.0 apples") is True
    assert judged("number", "42", "17+25=32. The answer is 32.") is False
    assert judged("number", "42", "I do not know.") is None


def test_letters() -> None:
    options = ("London", "Paris", "Rome", "Cairo")
    assert judged("letter", "B", "B", choices=options) is True
    assert judged("letter", "B", "The answer is B. Paris", choices=options) is True
    assert judged("letter", "B", "Paris", choices=options) is True
    assert judged("letter", "B", "所以答案是 A。", choices=options) is False
    assert judged("letter", "B", "None of them", choices=options) is None
