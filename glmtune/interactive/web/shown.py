"""How a conversation is shown: one message of the page for each turn, so that their places agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmtune.interactive.conversation import AnswerParts, Call, Conversation, Turn
from glmtune.interactive.web.safe_markdown import code_span, fenced, question_markdown, safe_markdown
from glmtune.interactive.web.words import Words

PENDING = "…"
"""Stands where an answer will be."""


def shown(
    conversation: Conversation, words: Words, writing: AnswerParts | None = None
) -> list[dict[str, Any]]:
    """Return the messages for the page.

    Args:
        conversation: all that was said.
        words: of the page's language.
        writing: the answer that is being written, shown after it; None: none is.
    """
    messages = [_message(turn, words) for turn in conversation.turns]
    if writing is not None:
        text = _thoughts(writing, words) + _answer_text(writing.text, writing.calls, words)
        messages.append({"role": "assistant", "content": text or PENDING})
    return messages


def with_ending(messages: list[dict[str, Any]], answer: AnswerParts, words: Words) -> list[dict[str, Any]]:
    """Say below the last answer why it ended early, if it did, and above it what was thought before it.

    Neither is a part of the conversation: both are gone when the next answer comes.
    """
    if answer.thoughts and messages and messages[-1]["role"] == "assistant":
        content = f"{_thoughts(answer, words)}{messages[-1]['content']}"
        messages[-1] = {**messages[-1], "content": content}
    reason = answer.finished.reason if answer.finished else "cancelled"
    if answer.finished and answer.finished.is_tuned is False and messages:
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{words.switched_off}"}
    note = {"length": words.cut, "cancelled": words.stopped}.get(reason)
    if note and messages and messages[-1]["role"] == "assistant":
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{note}"}
    return messages


def _message(turn: Turn, words: Words) -> dict[str, Any]:
    if turn["role"] == "assistant":
        calls = [
            Call(call["function"]["name"], call["function"]["arguments"])
            for call in turn.get("tool_calls", ())
        ]
        return {"role": "assistant", "content": _answer_text(turn["content"], calls, words) or words.empty}
    if turn["role"] == "tool":
        return {"role": "user", "content": fenced(turn["content"])}
    return {"role": "user", "content": question_markdown(turn["content"])}


def _thoughts(answer: AnswerParts, words: Words) -> str:
    """Return what was thought before an answer, as a quotation of its own; empty where nothing was."""
    if not answer.thoughts:
        return ""
    lines = [words.thoughts, "", *safe_markdown(answer.thoughts).split("\n")]
    return "\n".join(f"> {line}" for line in lines) + "\n\n"


def _answer_text(text: str, calls: Sequence[Call], words: Words) -> str:
    """Return an answer as Markdown; calls as what they are, a name and arguments in the model's words."""
    parts = [safe_markdown(text)] if text else []
    for call in calls:
        parts.append("🔧 " + words.calls_tool.format(name=code_span(call.name)))
        if call.arguments:
            parts.append(fenced(call.arguments, "json"))
    return "\n\n".join(parts)
