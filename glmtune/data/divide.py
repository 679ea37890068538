"""Keep some training rows for evaluation, where a user has no file for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

from glmtune.data.records import Conversation


def kept_for_evaluation(keys: Sequence[bytes], frac: float) -> list[bool]:
    """Divide rows into those to learn and those kept from it.

    Rows with the same question go to the same side, however often and wherever they occur: a question whose
    answer was learnt says nothing about what was understood. Which rows are kept follows from their text and
    the seed alone, so the order of the files does not matter, nor does another number of processes.

    Args:
        keys: of all rows, see `question_key`.
        frac: share of the rows to keep; the number is met as closely as groups of equal questions allow, and
            is never above it, except that at least one group is kept where it leaves something to learn.

    Returns:
        For each row whether it is kept.
    """
    groups = Counter(keys)
    wanted = max(1, round(frac * len(keys)))
    chosen: set[bytes] = set()
    count = 0
    for key, size in sorted(groups.items()):
        if count + size <= wanted:
            chosen.add(key)
            count += size
    if not chosen and groups:
        smallest = min(groups, key=lambda key: groups[key])  # of several the one that occurs first
        chosen.update([smallest] if groups[smallest] < len(keys) else [])
    return [key in chosen for key in keys]


def question_key(conversation: Conversation, seed: int) -> bytes:
    """Return what rows with the same question have in common.

    Args:
        conversation: a row.
        seed: decides which are kept.
    """
    # Plain texts answer nothing: they are told apart by themselves.
    messages = conversation.prompt or conversation.messages
    texts = [(message.role, message.content.strip(), message.tools) for message in messages]
    return sha256(f"{seed}\n{json.dumps(texts)}".encode("utf-8", "surrogatepass")).digest()
