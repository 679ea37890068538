"""IFEval: every kind of instruction with answers that follow it and that do not, the four published scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.answer import Answer
from evaluation.benchmarks.further import ifeval, instructions
from evaluation.benchmarks.tasks import make_task
from evaluation.reporting.results import make_result, results_json
from evaluation.running.fingerprint import fingerprint
from glmtune.errors import DataError, MissingExtraError
from tests.evaluation.doubles import IDENTITY

CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("keywords:existence", {"keywords": ["bridge", "water"]}, "Water under a BRIDGE.", True),
    ("keywords:existence", {"keywords": ["bridge", "water"]}, "Only water.", False),
    (
        "keywords:frequency",
        {"keyword": "rose", "frequency": 2, "relation": "at least"},
        "Rose, rosehip.",
        True,
    ),
    (
        "keywords:frequency",
        {"keyword": "rose", "frequency": 2, "relation": "less than"},
        "Rose, rose.",
        False,
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["blue"]}, "A bluebell.", True),
    ("keywords:forbidden_words", {"forbidden_words": ["blue"]}, "So Blue.", False),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 2, "let_relation": "at least"},
        "Qq",
        True,
    ),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 2, "let_relation": "less than"},
        "qQ",
        False,
    ),
    ("language:response_language", {"language": "de"}, "Das ist ein schönes Haus am Rande der Stadt.", True),
    ("language:response_language", {"language": "de"}, "This is a house at the edge of the town.", False),
    ("language:response_language", {"language": "de"}, "12345", True),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "Mr. Fox ran. Did he? He did!",
        True,
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "One. Two.",
        False,
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\nOne.\n***\nTwo.\n***", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\n***\nTwo.", False),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's two", True),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two three", False),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Later"},
        "First.\n\n'Later, it rained.",
        True,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "later"},
        "First.\n\nThen later.",
        False,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "later"},
        "First.\n\nLater.",
        False,
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], on [date]", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name]", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. more", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.S. more", False),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S more", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "* a\n- b\n  * c", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "* a\n** b\n* c", False),
    ("detectable_format:constrained_response", {}, " My answer is maybe. ", True),
    ("detectable_format:constrained_response", {}, "Maybe.", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and * *", False),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a\nSECTION 2 b",
        True,
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "Section 1\nSECTION 2",
        False,
    ),
    ("detectable_format:json_format", {}, '```json\n{"name": "Tom"}\n```', True),
    ("detectable_format:json_format", {}, "{name: Tom}", False),
    ("detectable_format:json_format", {}, "[" * 100_000, False),
    ("detectable_format:title", {}, "<<A song>>\nla", True),
    ("detectable_format:title", {}, "<< >>\nla", False),
    ("combination:two_responses", {}, "Hello.\n******\nGood day.", True),
    ("combination:two_responses", {}, "Hello.\n******\nHello.", False),
    ("combination:two_responses", {}, "A\n******\n\n******\nB", False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a colour."}, "name a colour. Red.", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a colour."}, "Red. Name a colour.", False),
    ("startend:end_checker", {"end_phrase": "Have a good day."}, 'Walk! "have a good day."', True),
    ("startend:end_checker", {"end_phrase": "Have a good day."}, "Have a good day. Bye.", False),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "STORM is COMING.",
        True,
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "STORM is COMING.",
        False,
    ),
    ("change_case:english_capital", {}, "THE SHOP IS CLOSED TODAY AND TOMORROW.", True),
    ("change_case:english_capital", {}, "THE SHOP IS closed.", False),
    ("change_case:english_lowercase", {}, "the shop is open today and tomorrow.", True),
    ("change_case:english_lowercase", {}, "The shop is open.", False),
    ("punctuation:no_comma", {}, "cat dog bird", True),
    ("punctuation:no_comma", {}, "cat, dog", False),
    ("startend:quotation", {}, ' "kind" ', True),
    ("startend:quotation", {}, '"', False),
]


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("langdetect")


def test_all_25_kinds_are_there_and_tried_both_ways() -> None:
    assert len(instructions.KINDS) == 25
    tried = {(kind, followed) for kind, _, _, followed in CASES}
    assert tried == {(kind, followed) for kind in instructions.KINDS for followed in (True, False)}


@pytest.mark.parametrize(
    ("kind", "given", "text", "followed"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)]
)
def test_an_instruction(kind: str, given: dict[str, Any], text: str, followed: bool) -> None:
    asked = {"id": kind, **given}
    instructions.check_known([asked])
    assert instructions.followed(asked, text) is followed


def test_an_empty_answer_follows_nothing() -> None:
    assert not instructions.followed({"id": "punctuation:no_comma"}, " \n")
    assert not instructions.followed_loosely({"id": "punctuation:no_comma"}, " \n")


@pytest.mark.parametrize(
    ("kind", "given", "text"),
    [
        ("startend:quotation", {}, 'Sure:\n"kind"'),
        ("startend:end_checker", {"end_phrase": "Bye."}, "Walk. Bye.\nAnything else?"),
        ("startend:quotation", {}, 'Sure:\n"kind"\nI hope that helps.'),
        ("change_case:english_lowercase", {}, "Here:\nthe shop is open today and tomorrow."),
        ("detectable_format:json_format", {}, "*{}*"),
    ],
    ids=["first line", "last line", "both", "capital in the first", "asterisks"],
)
def test_loosely(kind: str, given: dict[str, Any], text: str) -> None:
    asked = {"id": kind, **given}
    assert not instructions.followed(asked, text)
    assert instructions.followed_loosely(asked, text)


def test_languages_are_told_the_same_every_time() -> None:
    asked = {"id": "language:response_language", "language": "en"}
    found = {instructions.followed(asked, "taxi hotel 7 radio") for _ in range(20)}
    assert len(found) == 1


@pytest.mark.parametrize("text", ["[" * 60_000, "*" * 60_000, "\n" * 60_000, "a" * 60_000, "<<" * 30_000])
def test_long_answers_take_seconds_at_most(text: str) -> None:
    for kind, (_, check) in instructions.KINDS.items():
        given = next(case[1] for case in CASES if case[0] == kind)
        if not kind.startswith(("language", "change_case:english")):
            instructions.followed({"id": kind, **given}, text)
            assert check


def test_the_four_published_scores() -> None:
    """Two prompts, of which the second has two instructions: prompts 1 of 2, instructions 2 of 3."""
    task = make_task("ifeval", data_dir="sample")
    chosen = (task.samples[23], task.samples[24])
    task = task.__class__(**{**{name: getattr(task, name) for name in FIELDS}, "samples": chosen})
    said = ("cat dog bird", '"kind, very"')
    answers = [
        Answer(sample.subject, sample.index, completion=text, stop_reason="eos")
        for sample, text in zip(chosen, said, strict=True)
    ]
    result = make_result(task, answers, fingerprint(task, IDENTITY, 2048))
    assert result.rule == "strict"
    assert {rule: summary.micro.accuracy for rule, summary in result.summaries.items()} == pytest.approx(
        {"strict": 0.5, "loose": 0.5, "instructions_strict": 2 / 3, "instructions_loose": 2 / 3}
    )
    values = results_json(result)
    assert "is_graded" not in values
    assert result.judgements[1].extracted["strict"] == "startend:quotation=yes; punctuation:no_comma=no"


FIELDS = ("benchmark", "title", "protocol", "split", "samples", "prepared", "licence", "source", "groups")


def row(**change: Any) -> dict[str, Any]:
    return {
        "key": 1000,
        "prompt": "No comma.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
        **change,
    }


def test_the_official_file_and_the_copy_of_the_hub(describe: Callable[..., Path]) -> None:
    nulls = {"keyword": None, "num_words": None}
    lines = [json.dumps(row(kwargs=[nulls])) + "\n"] * 541
    folder = describe({"ifeval_input_data.jsonl": "".join(lines)})
    task = make_task("ifeval", data_dir=folder)
    assert len(task.samples) == ifeval.ROWS
    assert task.samples[0].answer == '[{"id": "punctuation:no_comma"}]'
    assert task.samples[0].row_id == "1000"
    assert task.prompt(task.samples[0]).turns[0].content == "No comma."
    describe({"ifeval_input_data.jsonl": "".join(lines[1:])})
    with pytest.raises(DataError, match="540 rows, but this file of ifeval must have 541"):
        make_task("ifeval", data_dir=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, "Did you mean `punctuation:no_comma`"),
        ({"kwargs": []}, "lists of the same length"),
        ({"instruction_id_list": [], "kwargs": []}, "at least 1"),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["(a"]}]},
            "`keywords:existence` has keywords=",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "more than"}],
            },
            "relation='more than'",
        ),
        ({"prompt": None}, "`prompt` is absent"),
        ({"kwargs": [["num_words"]]}, "must hold texts and objects"),
        ({"instruction_id_list": [["punctuation:no_comma"]]}, "must hold texts and objects"),
    ],
    ids=["kind", "lengths", "none", "pattern", "relation", "prompt", "arguments_list", "kind_list"],
)
def test_rows_that_cannot_be_checked(
    change: dict[str, Any], message: str, describe: Callable[..., Path]
) -> None:
    folder = describe({"input_data.jsonl": json.dumps(row(**change)) + "\n"}, {"test": {"ifeval": 1}})
    with pytest.raises(DataError, match=r"input_data.jsonl, line 1: .*" + message.replace("(", r"\(")):
        make_task("ifeval", data_dir=folder)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"glmtune\[ifeval\]"):
        make_task("ifeval", data_dir="sample")
