"""Tokenizers stored as tokenizer.json: ids and texts are transformers', tokens that users add survive."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from glmtune.errors import CheckpointError
from glmtune.export.tokenizer import fast_tokenizer, save_fast_tokenizer
from glmtune.loading import load_tokenizer
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.load import load_tokenizer_folder
from tests.models.templates.chat_folders import FORMS, chat_tokenizer, theirs

TEXTS = [
    "",
    " ",
    "How many legs does a cat have? Four legs.",
    "  leading and trailing  ",
    "x = 1\n\n\n\ty = 22\r\n",
    "你好，今天去哪里？😀 👩‍👩‍👧 é",
    "\x00\x7f\ufeff \u2028",
    "1234567890 3.14 －５",
]


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    return chat_tokenizer(tmp_path, FORMS["roles"])


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_transformers(ours: Any, tmp_path: Path, text: str) -> None:
    reference = theirs(tmp_path)
    ids = reference.encode(text, add_special_tokens=False)
    assert ours.text_ids(text) == ids
    assert ours(text)["input_ids"] == reference(text)["input_ids"]
    assert ours.decode(ids) == reference.decode(ids) == text
    assert ours.tokenize(text) == reference.tokenize(text)
    whole = reference(text)["input_ids"]
    assert ours.decode(whole, skip_special_tokens=True) == reference.decode(whole, skip_special_tokens=True)
    assert ours.decode(whole) == reference.decode(whole)


def test_names_of_special_tokens_are_text(ours: Any) -> None:
    for name in ours.command_names:
        ids = ours.text_ids(f"a {name} b")
        assert ours.get_command(name) not in ids
        assert ours.decode(ids) == f"a {name} b"
    with pytest.raises(KeyError):
        ours.get_command("a")


def test_half_a_surrogate_pair_becomes_a_replacement(ours: Any) -> None:
    assert ours.decode(ours.text_ids("a\ud83db")) == "a\ufffdb"


def streamed(tokenizer: Any, ids: list[int], **options: Any) -> str:
    stream = tokenizer.token_text(**options)
    return "".join(stream.feed(token) for token in ids) + stream.finish()


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_is_what_decode_makes_of_all(ours: Any, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(ours.vocab_size) for _ in range(60)]
    assert streamed(ours, ids) == ours.decode(ids)
    assert streamed(ours, ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
    broken = [rng.choice(ours.text_ids("你😀é")) for _ in range(40)]  # bytes that are no characters
    assert streamed(ours, broken) == ours.decode(broken)


def test_a_character_comes_whole(ours: Any) -> None:
    ids = ours.text_ids("😀!")
    assert len(ids) > 2
    stream = ours.token_text()
    pieces = [stream.feed(token) for token in ids]
    assert pieces == [""] * (len(ids) - 2) + ["😀", "!"]


def test_bytes_that_become_no_character_hold_nothing_back_for_ever(ours: Any) -> None:
    broken = ours.text_ids("😀")[0]
    stream = ours.token_text()
    given = [stream.feed(broken) for _ in range(200)]
    assert sum(map(len, given)) > 150, "a run of broken bytes is decoded anew for every token"
    assert "".join(given) + stream.finish() == ours.decode([broken] * 200)


def test_tokens_that_a_user_adds_survive(ours: Any, tmp_path: Path) -> None:
    assert ours.add_tokens(["<unit>", "零件"]) == 2
    assert ours.add_special_tokens({"additional_special_tokens": ["<|part|>"]}) == 1
    text = "a <unit>零件 b<|part|>"
    ids = ours.text_ids(text)
    assert [each for each in ids if each >= ours.vocab_size] == [ours.vocab_size + n for n in range(3)]
    assert streamed(ours, ids) == ours.decode(ids) == text
    assert ours.decode(ids, skip_special_tokens=True) == "a <unit>零件 b"
    ours.save_pretrained(tmp_path / "saved")
    again = load_tokenizer_folder(tmp_path / "saved", Family.TRANSFORMERS)
    assert again.text_ids(text) == ids
    assert again.decode(ids) == text
    assert len(again) == len(ours)
    assert again.chat_template == ours.chat_template
    reference = theirs(tmp_path / "saved")
    assert reference.encode(text, add_special_tokens=False) == ids
    assert reference.decode(ids) == text
    again.save_pretrained(tmp_path / "twice")
    assert load_tokenizer_folder(tmp_path / "twice", Family.TRANSFORMERS).text_ids(text) == ids


def test_tokens_that_were_added_with_transformers_are_read(ours: Any, tmp_path: Path) -> None:
    reference = theirs(tmp_path)
    reference.add_tokens(["<unit>", "零件"])
    reference.save_pretrained(tmp_path / "added")
    loaded = load_tokenizer_folder(tmp_path / "added", Family.TRANSFORMERS)
    text = "a <unit>零件 b"
    assert loaded.text_ids(text) == reference.encode(text, add_special_tokens=False)
    assert streamed(loaded, loaded.text_ids(text)) == text
    loaded.save_pretrained(tmp_path / "saved")
    assert load_tokenizer_folder(tmp_path / "saved", Family.TRANSFORMERS).text_ids(text) == loaded.text_ids(
        text
    )
    assert theirs(tmp_path / "saved").encode(text, add_special_tokens=False) == loaded.text_ids(text)


def test_a_pickle_and_a_saved_folder_are_the_same(ours: Any, tmp_path: Path) -> None:
    text = "How many? 你好"
    again = pickle.loads(pickle.dumps(ours))
    assert again.text_ids(text) == ours.text_ids(text)
    assert again.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == (
        ours.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    )
    ours.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json",):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / name).read_bytes()
    for role in (ours.eos_token_id, ours.pad_token_id):
        assert role == ours.end_id
    assert theirs(tmp_path / "saved").chat_template == ours.chat_template


def test_a_file_that_is_no_tokenizer_is_refused(ours: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": 3}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer_folder(tmp_path, Family.TRANSFORMERS)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no `tokenizer\.json`"):
        load_tokenizer_folder(tmp_path, Family.TRANSFORMERS)


def test_without_an_end_token_nothing_can_end(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, FORMS["roles"], eos_token=None)
    with pytest.raises(CheckpointError, match="names no `eos_token`"):
        _ = tokenizer.end_id


# ---- exports of the releases ----


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The tokenizer of glm-tiny (sentencepiece), and what reads its export."""
    folder = tmp_path_factory.mktemp("export")
    original = load_tokenizer("glm-tiny")
    save_fast_tokenizer(fast_tokenizer(original), folder)
    (folder / "config.json").write_text('{"model_type": "glm"}', encoding="utf-8")
    return original, load_tokenizer_folder(folder, Family.TRANSFORMERS)


@pytest.mark.parametrize(
    "messages",
    [
        [Message("user", "你好")],
        [Message("user", "Hi there"), Message("assistant", "Hello!"), Message("user", " what? ")],
        [Message("system", "Be brief."), Message("user", "x\n\n\ty")],
        [Message("user", "</s>[gMASK] <sop>")],
    ],
)
def test_an_export_has_the_prompts_of_the_original(
    exported: tuple[Any, Any], messages: list[Message]
) -> None:
    original, export = exported
    assert template_for(export).encode_prompt(export, messages) == (
        template_for(original).encode_prompt(original, messages)
    )
    for text in ("Hello!", " Hello", "你好。\n", ""):
        answer = Message("assistant", text)
        assert template_for(export).encode_answer(export, answer) == (
            template_for(original).encode_answer(original, answer)
        )
    assert template_for(export).stop_ids(export) == template_for(original).stop_ids(original)


@pytest.mark.parametrize("seed", range(10))
def test_an_export_streams_what_it_decodes(exported: tuple[Any, Any], seed: int) -> None:
    original, export = exported
    rng = random.Random(seed)
    pieces = [rng.randrange(original.get_command("[gMASK]")) for _ in range(60)]
    single_bytes = [
        each for each in range(original.vocab_size) if f"{export.convert_ids_to_tokens(each)}"[:3] == "<0x"
    ]
    letters = [rng.choice([*single_bytes, *export.text_ids("😀龘 hello  x")]) for _ in range(60)]
    for ids in (pieces, [*export.text_ids("a"), *letters], export.text_ids(" 😀龘 é\n\n x")):
        assert streamed(export, ids) == export.decode(ids)
        assert streamed(export, ids, goes_on=True).lstrip() == export.decode(ids).lstrip()
        shown = export.decode(ids, skip_special_tokens=True)
        assert shown == original.decode(ids, skip_special_tokens=True)
        assert streamed(export, ids, skip_special_tokens=True) == shown


def test_a_blank_in_front_stays_behind_another_text(exported: tuple[Any, Any]) -> None:
    _, export = exported
    ids = export.text_ids("legs")
    assert streamed(export, ids) == "legs"
    assert streamed(export, ids, goes_on=True) == " legs"
