"""Tokens decoded one by one give the text of decoding them all at once, for every vocabulary."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder

TEXTS = (
    "你好，world! 3 + 4 = 7；🙂 naïve\n\n  deux\tmots，。[[训练时间]] 𠮷野家 👩‍👩‍👧 <n> <|tab|> <|blank_3|> <|user|>",
    "          a\n    b\n\n\n<0x41> ▁ \x00 é",
    "   ",
)
CASES = [
    ("tiny_v1", Family.CHATGLM),
    ("tiny_v2", Family.CHATGLM2),
    ("tiny_v2", Family.CHATGLM3),
    ("tiny_glm4", Family.GLM4),
    ("chatglm-6b", Family.CHATGLM),
    ("chatglm2-6b", Family.CHATGLM2),
    ("chatglm2-6b", Family.CHATGLM3),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def tokenizer(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path) -> Any:
    name, family = request.param
    folder = oracles / "tokenizers" / name if name.startswith("tiny") else released_tokenizers / name
    return load_tokenizer_folder(folder, family)


def pieces_of(tokenizer: Any, ids: list[int], **options: Any) -> list[str]:
    stream = tokenizer.token_text(**options)
    return [*[stream.feed(index) for index in ids], stream.finish()]


def random_ids(tokenizer: Any, seed: int) -> list[int]:
    """Runs of bytes, white space, commands, words and characters, in any order."""
    rng = random.Random(seed)
    size = tokenizer.num_reserved_ids
    names = [
        f"<0x{value:02X}>"
        for value in (0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xED, 0x20, 0xFF)
    ]
    if hasattr(tokenizer, "sp_model"):
        offset = getattr(tokenizer, "num_image_tokens", 0)
        special = [
            tokenizer.sp_model.PieceToId(name) + offset for name in [*names, "▁", "<n>", "<", "n", ">"]
        ]
    else:
        special = [
            index
            for index in range(tokenizer.vocab_size)
            if len(tokenizer.encoding.decode_single_token_bytes(index)) == 1
        ]
    special += list(range(size - 15, size))
    text = tokenizer.text_ids(rng.choice(TEXTS))
    ids: list[int] = []
    for _ in range(rng.randrange(1, 30)):
        kind = rng.randrange(4)
        if kind == 0:
            ids.append(rng.randrange(size))
        elif kind == 1:
            start = rng.randrange(len(text))
            ids += text[start : start + rng.randrange(1, 8)]
        else:
            ids += rng.choices(special, k=rng.randrange(1, 5))
    return ids


@pytest.mark.parametrize("skip", [False, True])
def test_joined_pieces_are_the_whole(tokenizer: Any, skip: bool):
    cases = [tokenizer.text_ids(text) for text in TEXTS] + [
        random_ids(tokenizer, seed) for seed in range(400)
    ]
    for ids in cases:
        pieces = pieces_of(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_text_is_handed_out_as_soon_as_it_is_certain(tokenizer: Any):
    ids = tokenizer.text_ids("ab你好🙂 cd 12")
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces).strip() == "ab你好🙂 cd 12"
    assert pieces[-1] == ""
    assert "\ufffd" not in "".join(pieces)
    for number in range(1, len(ids)):
        sure = tokenizer.decode(ids[:number]).rstrip("\ufffd")
        assert "".join(pieces[:number]) == sure


def test_broken_bytes_do_not_hold_up_what_follows(tokenizer: Any):
    word = tokenizer.text_ids("word")
    if hasattr(tokenizer, "sp_model"):
        offset = getattr(tokenizer, "num_image_tokens", 0)
        broken = [tokenizer.sp_model.PieceToId(f"<0x{value:02X}>") + offset for value in (0xE4, 0xBD)]
    else:
        broken = [tokenizer.encoding.encode_single_token(bytes([value])) for value in (0xE4, 0xBD)]
    pieces = pieces_of(tokenizer, [*broken, *word])
    assert pieces[:2] == ["", ""]
    assert pieces[2].startswith("\ufffd")
    assert "".join(pieces).endswith("word")
    assert pieces[-1] == ""


def test_tokens_left_out_and_text_that_goes_on(tokenizer: Any):
    ids = tokenizer.text_ids("word word")
    assert "".join(pieces_of(tokenizer, ids, left_out=set(ids))) == ""
    whole = tokenizer.decode([*ids, *ids])
    first = tokenizer.decode(ids)
    assert first + "".join(pieces_of(tokenizer, ids, goes_on=True)) == whole
