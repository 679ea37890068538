"""The chats of a browser: kept there, read back with the caution that anything from outside needs.

The server keeps nothing between two questions. So a chat outlives its server, and nobody else's machine
holds what was said. What a browser sends is data of a stranger: `read_chat` checks every message of it.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glmtune.errors import DataError, GlmtuneError
from glmtune.interactive.conversation import Conversation, Turn

Stored = dict[str, Any]
"""A chat as JSON values, as the browser keeps it."""

MAX_CHATS = 50
MAX_KEPT_BYTES = 2 * 10**6
"""Browsers give a page some 5 MB, and what is kept is longer by a third there."""
TITLE_LENGTH = 28


@dataclass(slots=True)
class Chat:
    """A conversation, and beside it one with the same questions that the base alone answers.

    Attributes:
        main: what is shown in any case.
        base: the base's own conversation, where both are compared; else None.
        id: tells the chats of a browser apart.
    """

    main: Conversation = field(default_factory=Conversation)
    base: Conversation | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(6))

    @property
    def title(self) -> str:
        """The first question, cut."""
        first = next((turn["content"] for turn in self.main.turns if turn["role"] == "user"), "")
        line = " ".join(first.split())
        return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1] + "…"

    def stored(self) -> Stored:
        """Return it as the browser keeps it."""
        base = None if self.base is None else copy.deepcopy(self.base.turns)
        return {
            "id": self.id,
            "title": self.title,
            "system": self.main.system,
            "messages": copy.deepcopy(self.main.turns),
            "base": base,
        }

    def ask(self, text: str, *, compares: bool) -> None:
        """Add a question, or the result of the tool that was called last."""
        if compares:
            self.compared()
        is_result = bool(self.main.open_calls)
        for conversation in self._conversations(compares):
            if not is_result:
                conversation.ask(text)
            elif conversation.open_calls:  # the base may not have called one
                conversation.add_tool_result(text)

    def edit(self, number: int, text: str, *, compares: bool) -> None:
        """Put another question in the place of one; all that followed it goes.

        Args:
            number: of the question, from 0.
            text: the new question.
            compares: do so in the base's conversation, too.

        Raises:
            GlmtuneError: there is no such question.
        """
        if compares:
            self.compared()
        for conversation in self._conversations(compares):
            conversation.edit(_place(conversation, number), text)

    def regenerate(self, number: int, *, compares: bool) -> None:
        """Take back all that followed a question, from 0, so that it is answered anew.

        Raises:
            GlmtuneError: there is no such question.
        """
        if compares:
            self.compared()
        for conversation in self._conversations(compares):
            del conversation.turns[_place(conversation, number) + 1 :]

    def take_back_unanswered(self) -> str:
        """Remove a last question that got no answer, as its page was left; return it."""
        if self.main.is_waiting and self.main.turns[-1]["role"] == "user":
            return self.main.undo()
        return ""

    def _conversations(self, compares: bool) -> list[Conversation]:
        return [self.main, self.base] if compares and self.base is not None else [self.main]

    def compared(self) -> Conversation:
        """Return the base's conversation; it begins with the tuned model's where it has none of its own."""
        if self.base is None or _questions(self.base.turns) != _questions(self.main.turns):
            self.base = Conversation(self.main.system, copy.deepcopy(self.main.turns))
        self.base.system = self.main.system
        return self.base


def read_chat(stored: object) -> Chat:
    """Read a chat that a browser kept; a new one where it holds none, or is damaged."""
    if not isinstance(stored, dict) or not stored.get("messages"):
        return Chat()
    try:
        main = _read_turns(stored["messages"])
        base = None if not stored.get("base") else _read_turns(stored["base"])
    except DataError:
        return Chat()
    system = stored.get("system")
    main.system = system if isinstance(system, str) else ""
    found = Chat(main, base)
    chat_id = stored.get("id")
    if isinstance(chat_id, str) and chat_id.isalnum() and len(chat_id) <= 32:
        found.id = chat_id
    return found


def read_chats(stored: object) -> list[Stored]:
    """Return the entries of a browser's list that can be chats, the newest first."""
    if not isinstance(stored, list):
        return []
    return [
        item
        for item in stored[:MAX_CHATS]
        if isinstance(item, dict) and isinstance(item.get("id"), str) and isinstance(item.get("title"), str)
    ]


def with_chat(chats: Sequence[Stored], chat: Chat) -> list[Stored]:
    """Return the list with a chat as its newest, without what a browser has no room for."""
    others = [item for item in chats if item["id"] != chat.id]
    kept = [*([chat.stored()] if chat.main.turns else []), *others][:MAX_CHATS]
    size = 0
    for place, item in enumerate(kept):
        size += len(json.dumps(item, ensure_ascii=False).encode())
        if size > MAX_KEPT_BYTES and place:
            return kept[:place]
    return kept


def question_number(conversation: Conversation, place: int) -> int:
    """Return the number, from 0, of the question at a place, or of the last one before it."""
    return sum(turn["role"] == "user" for turn in conversation.turns[: place + 1]) - 1


def _place(conversation: Conversation, number: int) -> int:
    places = [place for place, turn in enumerate(conversation.turns) if turn["role"] == "user"]
    if not 0 <= number < len(places):
        raise GlmtuneError("There is no such question any more.")
    return places[number]


def _read_turns(messages: object) -> Conversation:
    return Conversation.from_json(json.dumps(messages))


def _questions(turns: Sequence[Turn]) -> list[str]:
    return [turn["content"] for turn in turns if turn["role"] == "user"]
