"""Some conversations at a time to arrays: encoded for training, or measured whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from glmtune.data.encode import EncodedRow, encode_training_row
from glmtune.data.lengths import training_lengths
from glmtune.data.records import Conversation, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.data.truncation import TruncationCounts, count_truncation
from glmtune.labels import IGNORE_INDEX
from glmtune.messages import Message
from glmtune.models.templates.renderer import TextTokenizer

BATCH_ROWS = 256
"""Conversations that a process takes at once: some hundredths of a second of work."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Rows of some conversations, one behind the other.

    Attributes:
        input_ids: of all rows, int32 ``[tokens]``.
        labels: likewise, −100 where nothing is learnt, int32 ``[tokens]``.
        lengths: tokens of each row, int32 ``[rows]``.
        num_loss_tokens: tokens of each row that carry loss, int32 ``[rows]``.
        desirable: whether each row's answer is one to give more often, bool ``[rows]``.
        truncation: what was cut.
        problems: place among the conversations and what is wrong, of those that cannot be encoded.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    num_loss_tokens: np.ndarray
    desirable: np.ndarray
    truncation: TruncationCounts
    problems: Sequence[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class MeasuredBatch:
    """How long some conversations are, before any truncation, and which are alike.

    Attributes:
        prompts: tokens, int64, see `glmtune.data.lengths.RowLengths`.
        answers: likewise.
        row_keys: of the conversations, uint64 ``[conversations]``: equal where all messages are.
        prompt_keys: likewise of what comes before the last answer.
        num_multi_turn: conversations with more than one question.
    """

    prompts: np.ndarray
    answers: np.ndarray
    row_keys: np.ndarray
    prompt_keys: np.ndarray
    num_multi_turn: int


def encode_batch(
    tokenizer: TextTokenizer, settings: DataSettings, conversations: Sequence[Conversation]
) -> EncodedBatch:
    """Encode conversations for training.

    Args:
        tokenizer: a GLM tokenizer; it decides the template.
        settings: the data settings, lengths in place.
        conversations: each with an answer.
    """
    rows: list[EncodedRow] = []
    problems: list[tuple[int, str]] = []
    for place, conversation in enumerate(conversations):
        try:
            rows += encode_training_row(tokenizer, conversation, settings)
        except RowProblem as problem:
            problems.append((place, str(problem)))
    return EncodedBatch(
        input_ids=_joined([row.input_ids for row in rows]),
        labels=_joined([row.labels for row in rows]),
        lengths=np.array([len(row.input_ids) for row in rows], dtype=np.int32),
        num_loss_tokens=np.array(
            [len(row.labels) - row.labels.count(IGNORE_INDEX) for row in rows], dtype=np.int32
        ),
        desirable=np.array([row.is_desirable for row in rows], dtype=np.bool_),
        truncation=count_truncation(rows),
        problems=problems,
    )


def measure_batch(
    tokenizer: TextTokenizer, settings: DataSettings, conversations: Sequence[Conversation]
) -> MeasuredBatch:
    """Measure conversations; those that cannot be encoded are left to whoever encodes them.

    Args:
        tokenizer: a GLM tokenizer; it decides the template.
        settings: what shapes a prompt.
        conversations: each with an answer.
    """
    lengths = training_lengths(conversations, tokenizer, settings)
    return MeasuredBatch(
        prompts=lengths.prompts,
        answers=lengths.answers,
        row_keys=np.array([_row_key(each) for each in conversations], dtype=np.uint64),
        prompt_keys=np.array([_key(each.prompt) for each in conversations], dtype=np.uint64),
        num_multi_turn=sum(
            sum(message.role == "user" for message in each.messages) > 1 for each in conversations
        ),
    )


def _joined(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.fromiter((token for row in rows for token in row), dtype=np.int32)


def _row_key(conversation: Conversation) -> int:
    worse = () if conversation.rejected is None else (conversation.rejected,)
    return _key((*conversation.messages, *worse))


def _key(messages: Sequence[Message]) -> int:
    # 64 bits: of a million rows two different ones share a key once in thirty million data sets.
    digest = blake2b(digest_size=8)
    for message in messages:
        fields = (message.role, message.content, message.metadata, message.tools)
        digest.update(repr((*map(len, fields), message.is_call, message.has_loss)).encode())
        digest.update("".join(fields).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")
