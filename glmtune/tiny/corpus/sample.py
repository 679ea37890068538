"""The row type of glm-tiny's corpus and the small word lists that several skills share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from glmtune.messages import Message

LEXICON = Path(__file__).parent / "lexicon"
LETTERS = "ABCD"


def words(text: str) -> list[str]:
    """Split a list of words at its blanks."""
    return text.split()


NAMES_ZH = words("小明 小红 小刚 小丽 小华 小芳 小强 小美 张三 李四 王五 赵六 老王 老李 阿强 阿梅 大山 婷婷")
NAMES_EN = words("Tom Amy Ben Lucy Jack Mary Sam Anna Leo Kate Max Ella Dan Rose Bob Nina Paul Jane")
COLOURS = {
    "红色": "red",
    "蓝色": "blue",
    "绿色": "green",
    "黄色": "yellow",
    "白色": "white",
    "黑色": "black",
    "紫色": "purple",
    "灰色": "grey",
}
THINGS = {
    "杯子": "cup",
    "铅笔": "pencil",
    "书": "book",
    "球": "ball",
    "帽子": "hat",
    "钥匙": "key",
    "手表": "watch",
    "盒子": "box",
    "雨伞": "umbrella",
    "椅子": "chair",
}

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of the corpus.

    Attributes:
        skill: what it teaches; one of ``glmtune.tiny.corpus.mix.MIX``.
        messages: a conversation ending with the assistant's answer, or empty for plain text.
        text: plain text that is learnt from its first token, or empty for a conversation.
        key: the short correct answer a test looks for (a number, a letter, a word), if there is one.
    """

    skill: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    key: str = ""

    def as_row(self) -> dict[str, Any]:
        """Return the row as it stands in a JSONL file; plain text is one message from the assistant."""
        messages = self.messages or (Message("assistant", self.text),)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return {"messages": turns, "skill": self.skill}


def chat(skill: str, *turns: str, key: str = "") -> Sample:
    """Build a conversation from alternating user and assistant texts.

    Args:
        skill: the skill's name.
        turns: user, assistant, user, assistant, ...
        key: the short correct answer of the last turn.

    Returns:
        The sample.

    >>> chat("chat", "你好", "你好！").messages[1].role
    'assistant'
    """
    roles = ("user", "assistant")
    messages = tuple(Message(roles[index % 2], content) for index, content in enumerate(turns))
    return Sample(skill, messages, key=key)


def pick(rng: Random, items: Sequence[Item], *, skew: float = 0.0) -> Item:
    """Draw an item; with ``skew`` above 0 later items become rarer.

    Args:
        rng: source of randomness.
        items: what to draw from.
        skew: 0 draws evenly; 1 draws the last item far less often than the first.

    Returns:
        One of the items.
    """
    return items[int(len(items) * rng.random() ** (1.0 + skew))]


@cache
def lexicon(name: str) -> Any:
    """Read ``lexicon/<name>.yaml`` of this package once."""
    from glmtune.storage.yaml_text import read_yaml

    return read_yaml(LEXICON / f"{name}.yaml")


def worked_examples(rng: Random, skill: str, items: Sequence[tuple[str, str]], key: str) -> Sample:
    r"""Put solved exercises before a last one, as plain text or as one question of a chat.

    Args:
        rng: source of randomness.
        skill: the skill's name.
        items: the question with its cue (``Q: 1+1=?\nA:``), and the answer as it follows, blank included.
        key: the short correct answer of the last one.

    Returns:
        The sample.
    """
    *shots, (question, answer) = items
    before = "".join(f"{ask}{said}\n\n" for ask, said in shots)
    if rng.random() < 0.5:
        return chat(skill, before + question, answer.strip(), key=key)
    return Sample(skill, text=f"{before}{question}{answer}", key=key)
