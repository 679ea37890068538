"""The one type every conversation is made of, from data files to chat and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "observation")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of ``ROLES``; ``observation`` is a tool's result (ChatGLM3 and later).
        content: the text, without any template around it.
        metadata: tool name or language after the role token (ChatGLM3 and later), else empty.
        is_call: the assistant calls the tool that ``metadata`` names, and ``content`` is the JSON object of
            its arguments; each release writes a call in its own form.
        tools: JSON list of the tools that a system message announces; empty: none.
        has_loss: whether training learns it, if it is the assistant's.
    """

    role: str
    content: str
    metadata: str = ""
    is_call: bool = False
    tools: str = ""
    has_loss: bool = True
