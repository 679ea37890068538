"""Keep some training rows for evaluation, where a user has no file for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256

from glmtune.data.records import Conversation


def divide(
    conversations: Sequence[Conversation], frac: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Divide rows into those to learn and those kept from it.

    Rows with the same question go to the same side, however often and wherever they occur: a question whose
    answer was learnt says nothing about what was understood. Which rows are kept follows from their text and
    the seed alone, so the order of the files does not matter, nor does another number of processes.

    Args:
        conversations: all rows.
        frac: share of the rows to keep; the number is met as closely as groups of equal questions allow, and
            is never above it, except that at least one group is kept where it leaves something to learn.
        seed: decides which.

    Returns:
        Rows to learn and rows kept, each in the order given.
    """
    groups: dict[bytes, list[int]] = {}
    for place, conversation in enumerate(conversations):
        groups.setdefault(_key(conversation, seed), []).append(place)
    wanted = max(1, round(frac * len(conversations)))
    kept: set[int] = set()
    for _, places in sorted(groups.items()):
        if len(kept) + len(places) <= wanted:
            kept.update(places)
    if not kept:
        smallest = min(groups.values(), key=len, default=[])
        kept.update(smallest if len(smallest) < len(conversations) else [])
    return (
        [item for place, item in enumerate(conversations) if place not in kept],
        [item for place, item in enumerate(conversations) if place in kept],
    )


def _key(conversation: Conversation, seed: int) -> bytes:
    # Plain texts answer nothing: they are told apart by themselves.
    messages = conversation.prompt or conversation.messages
    texts = [(message.role, message.content.strip(), message.tools) for message in messages]
    return sha256(f"{seed}\n{json.dumps(texts)}".encode("utf-8", "surrogatepass")).digest()
