"""Text is handed out once it is final; joined, it is what decoding and cleaning the whole answer gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from glmtune.inference.requests.text_stream import AnswerText, StopSearch, chat_text, completion_text
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import template_for
from glmtune.models.templates.responses import process_response
from glmtune.models.templates.streamed_responses import cleaner_of
from glmtune.models.tokenizers.load import load_tokenizer_folder

CASES = [
    ("chatglm-6b", Family.CHATGLM),
    ("chatglm2-6b", Family.CHATGLM2),
    ("chatglm2-6b", Family.CODEGEEX2),
    ("chatglm2-6b", Family.CHATGLM3),
    ("tiny_glm4", Family.GLM4),
]
FAMILIES = [Family.CHATGLM, Family.CHATGLM2, Family.CHATGLM2_32K, Family.CODEGEEX2]
PARTS = [
    "你好",
    ",",
    "!",
    ":",
    "ok",
    " ",
    "\n",
    "[[",
    "训练",
    "时间",
    "]]",
    "[[训练时间]]",
    "🙂",
    "3:4",
    "？",
    "年",
    "[",
    "\t",
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: str(case[1]))
def tokenizer(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path) -> Any:
    name, family = request.param
    folder = oracles / "tokenizers" / name if name.startswith("tiny") else released_tokenizers / name
    return load_tokenizer_folder(folder, family)


def run(stream: AnswerText, ids: list[int]) -> list[str]:
    """The pieces of an answer; the engine feeds nothing behind a stop text."""
    pieces: list[str] = []
    for index in ids:
        pieces.append(stream.feed(index))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices(PARTS, k=rng.randrange(1, 25)))


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_cleaned_text_are_the_cleaned_whole(family: Family):
    for seed in range(1500):
        text, cleaner, rng = random_text(seed), cleaner_of(family), random.Random(seed)
        pieces, rest = [], text
        while rest:
            num = rng.randrange(1, 4)
            pieces.append(cleaner.feed(rest[:num]))
            rest = rest[num:]
        assert "".join([*pieces, cleaner.finish()]) == process_response(family, text).content, text


def test_tokens_of_an_answer_become_the_released_answer(tokenizer: Any):
    keeps = template_for(tokenizer).knows_tools
    for seed in range(150):
        ids = tokenizer.text_ids(random_text(seed))
        decoded = tokenizer.decode(ids)
        expected = decoded if keeps else process_response(tokenizer.family, decoded).content
        assert "".join(run(chat_text(tokenizer), ids)) == expected
        assert "".join(run(completion_text(tokenizer), ids)) == decoded


def test_case_04_marks_wait_for_their_right_neighbour(released_tokenizers: Path):
    tokenizer = load_tokenizer_folder(released_tokenizers / "chatglm-6b", Family.CHATGLM)
    pieces = [run(chat_text(tokenizer), tokenizer.text_ids(text)) for text in ("ok,你好", "ok,you", "你,x ")]
    assert ["".join(each) for each in pieces] == ["ok，你好", "ok,you", "你，x"]
    cleaner = cleaner_of(Family.CHATGLM)
    assert [cleaner.feed(text) for text in ("ok", ",", "你好", ",", " ")] == ["ok", "", "，你好", "，", ""]
    assert cleaner.finish() == ""


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_case_04_placeholder_never_appears(family: Family):
    cleaner = cleaner_of(family)
    parts = [cleaner.feed(text) for text in (" ", "到[", "[训练", "时间]]", "[[训练", "。")]
    assert [*parts, cleaner.finish()] == ["", "到", "", "2023年", "", "[[训练。", ""]


def test_case_03_characters_of_several_tokens(tokenizer: Any):
    text = "🥨🙂𠮷𠀀"
    ids = tokenizer.text_ids(text)
    assert len(ids) > len(text) + 4  # the last character is of several bytes in every vocabulary
    pieces = run(chat_text(tokenizer), ids)
    assert "".join(pieces).strip() == text
    assert pieces[-1] == ""
    cut = run(chat_text(tokenizer), ids[:-1])
    assert "".join(cut[:-1]).strip() == text[:-1]
    assert set(cut[-1]) == {"\ufffd"}


def test_case_01_stop_text_over_several_tokens(tokenizer: Any):
    text, stop = "很高兴为您的公司服务", "您的公"
    pieces = run(completion_text(tokenizer, (stop,)), tokenizer.text_ids(text))
    assert "".join(pieces).strip() == "很高兴为"
    assert len(pieces) <= len(tokenizer.text_ids(text)) + 1
    stream = chat_text(tokenizer, ("您", "高兴"))
    assert "".join(run(stream, tokenizer.text_ids(text))).strip() == "很"
    assert stream.is_stopped


def test_stop_text_is_found_for_every_cut_of_the_text():
    text = "abcabdabcab"
    for stop in (("abd",), ("bcabdab",), ("cab", "abcabd"), ("zz",), ("abcabx", "b"), ("bab", "dabcab!")):
        for cut in range(1, 5):
            search, out = StopSearch(stop), ""
            for start in range(0, len(text), cut):
                out += search.feed(text[start : start + cut])
                assert not any(each in out for each in stop)
                if search.is_stopped:
                    break
            out += "" if search.is_stopped else search.finish()
            # The one that is complete first ends the text, also where another began before it.
            ends = [*range(cut, len(text), cut), len(text)]
            places = [
                min((text.find(each, 0, end) for each in stop if each in text[:end]), default=-1)
                for end in ends
            ]
            place = next((place for place in places if place >= 0), len(text))
            assert out == text[:place]
            assert search.is_stopped == (place < len(text))


def test_blanks_in_front_are_no_stop_text_of_a_chat(tokenizer: Any):
    ids = [*tokenizer.text_ids("\n"), *tokenizer.text_ids("你好\n再见")]
    text = "".join(run(chat_text(tokenizer, ("\n",)), ids))
    assert text.strip() == ("" if tokenizer.family is Family.CODEGEEX2 else "你好")
    assert "".join(run(completion_text(tokenizer, ("\n",)), ids)) == ""


def test_stop_text_that_begins_with_blanks_counts_in_front():
    search = StopSearch(("\n\nUser:", "\n"), after_blanks=True)
    assert [search.feed(text) for text in ("\n", "\nUs", "er: hi")] == ["", "", ""]
    assert search.is_stopped


def test_case_13_tokens_that_end_answers_are_no_text(tokenizer: Any):
    ends = list(template_for(tokenizer).stop_ids(tokenizer))
    ids = [*tokenizer.text_ids("你好"), *ends, *tokenizer.text_ids("再见")]
    for stream in (chat_text(tokenizer), completion_text(tokenizer)):
        assert "".join(run(stream, ids)).replace(" ", "") == "你好再见"


def test_text_that_goes_on_keeps_its_blanks(tokenizer: Any):
    ids = tokenizer.text_ids("a b")
    text = "".join(run(chat_text(tokenizer, goes_on=True), ids))
    assert text in ("a b", " a b")
    if hasattr(tokenizer, "sp_model"):
        assert text == " a b"  # sentencepiece puts the blank in front, and only the start of a text loses it


def test_work_per_token_does_not_grow(tokenizer: Any):
    stream = chat_text(tokenizer, ("never to be found",))
    ids = tokenizer.text_ids("白日依山尽 yellow river, ")
    for _ in range(40):
        for index in ids:
            stream.feed(index)
    held = [vars(part) for part in (stream._tokens, stream._search)]  # pyright: ignore[reportPrivateUsage]
    texts = [value for each in held for value in each.values() if isinstance(value, str | bytes | list)]
    assert max(len(value) for value in texts) < 40
