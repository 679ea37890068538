"""A tokenizer of one id per character, so that lengths can be counted by eye."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from glmtune.data.records import Conversation
from glmtune.messages import Message
from glmtune.models.releases.families import Family

COMMANDS = ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


class CharacterTokenizer:
    """Ids are code points; control tokens lie above Unicode."""

    command_names = COMMANDS
    prefix_ids_: tuple[int, ...] = (0x110001, 0x110002)
    suffix_ids_: tuple[int, ...] = ()
    end_id = 0x110000

    def __init__(self, family: Family) -> None:
        self.family = family

    @property
    def prefix_ids(self) -> list[int]:
        return list(self.prefix_ids_)

    @property
    def suffix_ids(self) -> list[int]:
        return list(self.suffix_ids_)

    def text_ids(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def get_command(self, token: str) -> int:
        return 0x110001 + COMMANDS.index(token)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(index) for index in ids)

    def show(self, ids: Sequence[int]) -> str:
        """Ids as text: `$` is the end id, control tokens and everything without loss are `_`."""
        shown = {self.end_id: "$"}
        return "".join(shown.get(index, chr(index) if 0 <= index < 0x110000 else "_") for index in ids)


@pytest.fixture
def chatglm() -> CharacterTokenizer:
    """ChatGLM-6B puts its control tokens behind the text."""
    tokenizer = CharacterTokenizer(Family.CHATGLM)
    tokenizer.prefix_ids_, tokenizer.suffix_ids_ = (), tokenizer.prefix_ids_
    return tokenizer


@pytest.fixture
def chatglm2() -> CharacterTokenizer:
    return CharacterTokenizer(Family.CHATGLM2)


@pytest.fixture
def chatglm3() -> CharacterTokenizer:
    return CharacterTokenizer(Family.CHATGLM3)


def talk(*texts: str, system: str = "", line: int = 1) -> Conversation:
    """A conversation of alternating questions and answers."""
    messages = [Message("system", system)] if system else []
    messages += [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    return Conversation(tuple(messages), "rows.jsonl", line)


@pytest.fixture(name="talk")
def talk_fixture():
    return talk


@pytest.fixture
def write(tmp_path: Path):
    """Write a file and return its path."""

    def to(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return to
