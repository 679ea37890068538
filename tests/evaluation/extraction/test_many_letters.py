"""Letters of questions with more than four options, and the official rules of CMMLU and MMLU-Pro."""

from __future__ import annotations

import re

import pytest

from evaluation.extraction import cmmlu, many_letters, mmlu_pro
from evaluation.sample import Sample

TEN = Sample("mmlu_pro", "law", 0, "Which?", choices=tuple(f"option {number}" for number in range(10)))
FOUR = Sample("cmmlu", "arts", 0, "哪个？", choices=("一", "二", "三", "四"))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (H).", "H"),
        ("I think the answer is I.", "I"),
        ("I think it is hard. I am not sure.", None),
        ("A car is no ship. So G it is.", "G"),
        ("The answer is A or J.", None),
        ("答案是G。", "G"),
        ("故选J", "J"),
        (r"So \boxed{F}.", "F"),
        ("**Answer: E**", "E"),
        ("The answer is B. Wait, no. The answer is D.", "D"),
        ("C. option 2", "C"),
        ("A. option 0\nB. option 1\nC. option 2", None),
        ("(J) is correct, as I said.", "J"),
        ("option 7", "H"),
        ("The answer is K.", None),
        ("The answer is I think hard to say.", None),
        ("", None),
    ],
)
def test_loose(text: str, letter: str | None) -> None:
    assert many_letters.loose(text, TEN) == letter


def test_letters_go_as_far_as_the_options() -> None:
    five = Sample("mine", "mine", 0, "?", choices=("a", "b", "c", "d", "e"))
    assert many_letters.loose("The answer is E.", five) == "E"
    assert many_letters.loose("The answer is F.", five) is None
    twenty_six = Sample("mine", "mine", 0, "?", choices=tuple("abcdefghijklmnopqrstuvwxyz"))
    assert many_letters.loose("The answer is Z.", twenty_six) == "Z"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("answer is " * 20_000, (None, None, None)),
        ("A" * 100_000, (None, None, "A")),
        ("I " * 50_000, ("I", "I", None)),
        ("(" * 100_000, (None, None, None)),
    ],
    ids=["cues", "one word", "letters", "brackets"],
)
def test_long_answers_are_read_as_short_ones(text: str, found: tuple[str | None, ...]) -> None:
    """An expression that went back over the text again and again would not come to its end."""
    of_cmmlu = cmmlu.official(text.replace("answer is", "答案为"), FOUR)
    assert (many_letters.loose(text, TEN), mmlu_pro.official(text, TEN), of_cmmlu) == found


def official_of_mmlu_pro(text: str) -> str | None:
    """The published expressions as they stand."""
    for pattern, flags in (
        (r"answer is \(?([A-J])\)?", 0),
        (r".*[aA]nswer:\s*([A-J])", 0),
        (r"(\b[A-J]\b)(?!.*\b[A-J]\b)", re.DOTALL),
    ):
        if found := re.search(pattern, text, flags):
            return found.group(1)
    return None


@pytest.mark.parametrize(
    "text",
    [
        "the answer is (C). Or the answer is D.",
        "Answer: B. answer: C\nanswer: D",
        "no label\nAnswer:\nE and more",
        "Answer: answer: F",
        "B, then G",
        "I do not know",
        "nothing at all",
        "answer is \nAnswer: (J)",
    ],
)
def test_mmlu_pro_as_published(text: str) -> None:
    assert mmlu_pro.official(text, TEN) == official_of_mmlu_pro(text)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("C选项", "C"),
        ("经分析，答案是：D", "D"),
        ("故选B", "B"),
        ("所以A选项是正确的", "A"),
        ("答案应该是C", "C"),
        ("我认为B符合题意", "B"),
        ("选项A、B都不对，C当选", "C"),
        ("答案为下列中的D", "D"),
        ("应当是 B", "B"),
        ("不是 B", "B"),
        ("只有乙，也就是D", "D"),
        ("A或B", "A"),
        ("不知道", None),
        ("是C还是D", "D"),
        ("乙C丙D", None),
        ("", None),
    ],
)
def test_cmmlu(text: str, letter: str | None) -> None:
    assert cmmlu.official(text, FOUR) == letter
