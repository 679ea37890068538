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
    """

    role: str
    content: str
    metadata: str = ""
