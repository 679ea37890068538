"""Extraction rules on completions as models write them: a table of cases, each rule's answer beside its text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evaluation.extraction import bbh, letters, numbers
from evaluation.extraction.text import cut_at, plain
from evaluation.sample import Sample

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "extraction_cases.json").read_text(encoding="utf-8")
)


def rule(family: str, name: str):
    if family == "letter":
        return getattr(letters, name)
    if family == "number":
        return getattr(numbers, name)
    return getattr(bbh, name)(family.removeprefix("bbh:"))


def sample_of(case: dict[str, Any]) -> Sample:
    return Sample(
        "any", "any", 0, case.get("question", ""), tuple(case.get("options", ())), case.get("gold", "")
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['rules']}:{case['text'][:30]!r}")
def test_case(case: dict[str, Any]) -> None:
    got = {name: rule(case["rules"], name)(case["text"], sample_of(case)) for name in case["expect"]}
    assert got == case["expect"]


def test_the_table_is_wide_enough() -> None:
    families = Counter(case["rules"].split(":")[0] for case in CASES)
    assert len(CASES) >= 150
    assert min(families[name] for name in ("letter", "number", "bbh")) >= 40
    assert {f"bbh:{kind}" for kind in bbh.FORMS} <= {case["rules"] for case in CASES}
    assert len({(case["rules"], case["text"]) for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "extracted", ["18", "18.0", "18.00", "018"], ids=["whole", "one place", "two places", "padded"]
)
def test_decimals_are_compared_by_value(extracted: str) -> None:
    assert numbers.is_the_same_number(extracted, Sample("gsm8k", "gsm8k", 0, "", answer="18"))
    assert not numbers.is_the_same_number(extracted, Sample("gsm8k", "gsm8k", 0, "", answer="18.5"))


def test_commas_in_the_gold_answer_do_not_matter() -> None:
    sample = Sample("gsm8k", "gsm8k", 0, "", answer="1,080")
    assert numbers.is_the_same_number("1080.00", sample)
    assert numbers.is_the_same_text("1080", sample)
    assert not numbers.is_the_same_text("1080.00", sample)
    assert not numbers.is_the_same_number("about 1080", sample)


def test_invalid_is_never_taken_for_valid() -> None:
    sample = Sample("bbh", "formal_fallacies", 0, "", answer="valid")
    found = bbh.normalized("valid_invalid")("So the answer is invalid.", sample)
    assert found is not None
    assert not bbh.is_the_same_answer(found, sample)


def test_options_beyond_d_exist() -> None:
    sample = Sample("bbh", "reasoning_about_colored_objects", 0, "(Q) sixteen", answer="(Q)")
    assert bbh.normalized("letter")("the answer is Q.", sample) == "(Q)"
    assert bbh.official("letter")("the answer is (Q).", sample) == "(Q)"


def test_full_width_and_markdown_become_plain() -> None:
    assert plain("**答案：１８　元**") == "答案:18 元"
    assert cut_at("a\nQ: b", bbh.STOPS) == "a"
    assert cut_at("a Q: b", bbh.STOPS) == "a Q: b"
