"""How long rows are, and the limits that follow from it where the settings name none.

A limit that is null holds 99 % of the rows: the longest percent may be ten times as long, and a batch is
padded to its longest row. What it comes to is said, recorded with what is trained, and kept when a run goes
on, so that validation, a resumed run and `predict` cut as training did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from glmtune.data.encode import encode_prompt_row, encode_reference_row, encode_training_row
from glmtune.data.records import Conversation, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.labels import IGNORE_INDEX
from glmtune.models.templates.renderer import TextTokenizer, template_for

KEPT_FRAC = 0.99
"""Share of the rows that a limit leaves whole."""
STEP_TOKENS = 8
"""Limits are multiples of this, as are the shapes that GPUs multiply fastest."""
NO_ANSWERS_TARGET = 512
"""Longest answer where no row has one to go by: questions alone are asked."""
LENGTHS = ("max_source_length", "max_target_length")
"""The two settings of `DataSettings`."""
_NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Tokens of rows as they are, counted as the limits count them.

    Attributes:
        prompts: of every prompt, int64 ``[rows]``.
        answers: of every answer, int64 ``[rows]``; empty where there are only questions.
    """

    prompts: np.ndarray
    answers: np.ndarray


def without_limits(settings: DataSettings) -> DataSettings:
    """Return settings that encode rows whole, to see how long they are."""
    # Limits cut what is learnt and what is not alike, so all of an answer counts.
    return replace(
        settings,
        max_source_length=None,
        max_target_length=None,
        loss_on="answer",
        loss_on_thoughts=True,
        packing=False,
    )


def training_lengths(
    conversations: Iterable[Conversation], tokenizer: TextTokenizer, settings: DataSettings
) -> RowLengths:
    """Count the tokens of rows to learn; rows that cannot be encoded are left to whoever encodes them.

    Args:
        conversations: ending with an answer.
        tokenizer: a GLM tokenizer; it decides the template.
        settings: what shapes a prompt; ``loss_on`` tells whether earlier answers are rows of their own.
    """
    template = template_for(tokenizer)
    whole = without_limits(settings)
    if settings.loss_on == "all_turns" and not template.one_row_per_conversation:
        whole = replace(whole, loss_on="all_turns")
    prompts: list[int] = []
    answers: list[int] = []
    for conversation in conversations:
        # Counted whether it is learnt or not: the limit cuts it all the same.
        last = replace(conversation.messages[-1], has_loss=True)
        counted = replace(conversation, messages=(*conversation.messages[:-1], last))
        with suppress(RowProblem):
            for row in encode_training_row(tokenizer, counted, whole):
                # `sop` of ChatGLM-6B is a label, too, and so counts with the answer, as its script counts it.
                answer = len(row.labels) - row.labels.count(IGNORE_INDEX)
                prompts.append(len(row.input_ids) - answer)
                # The end token counts in ChatGLM-6B's limit alone.
                answers.append(answer - (not template.bidirectional_context))
    return RowLengths(np.array(prompts, dtype=np.int64), np.array(answers, dtype=np.int64))


def prediction_lengths(
    conversations: Iterable[Conversation], tokenizer: TextTokenizer, settings: DataSettings
) -> RowLengths:
    """Count the tokens of rows to answer: prompts, and references as the official evaluation cuts them.

    Args:
        conversations: with or without an answer.
        tokenizer: a GLM tokenizer; it decides the template.
        settings: what shapes a prompt.
    """
    template = template_for(tokenizer)
    whole = without_limits(settings)
    prompts: list[int] = []
    answers: list[int] = []
    for conversation in conversations:
        with suppress(RowProblem):
            prompt = encode_prompt_row(tokenizer, conversation, whole)
            prompts.append(len(prompt.input_ids) - template.bidirectional_context)
            if conversation.answer is not None:
                answers.append(len(encode_reference_row(tokenizer, conversation.answer.content, _NO_LIMIT)))
    return RowLengths(np.array(prompts, dtype=np.int64), np.array(answers, dtype=np.int64))


def limit_for(lengths: np.ndarray) -> int:
    """Return the smallest multiple of 8 tokens that holds 99 % of the lengths.

    Args:
        lengths: of all rows, at least one.
    """
    needed = int(np.percentile(lengths, 100 * KEPT_FRAC, method="inverted_cdf"))
    return max(STEP_TOKENS, -(-needed // STEP_TOKENS) * STEP_TOKENS)


def has_lengths(settings: DataSettings) -> bool:
    """Say whether both limits are numbers."""
    return settings.max_source_length is not None and settings.max_target_length is not None


def resolve_lengths(settings: DataSettings, rows: RowLengths, *, context: int | None = None) -> DataSettings:
    """Put numbers in place of limits that are null.

    Args:
        settings: as asked for; limits that are given stay.
        rows: as counted; nothing is counted of rows that are all unusable, and then nothing is cut of them.
        context: of the model, in tokens, which prompt, answer and end token share; a prefix takes none of
            it. None: not known.

    Returns:
        The same with numbers.

    Raises:
        ConfigError: packed rows could not hold the longest row.
    """
    source, target = settings.max_source_length, settings.max_target_length
    longest_source = source or _limit_or(rows.prompts, STEP_TOKENS)
    longest_target = target or _limit_or(rows.answers, NO_ANSWERS_TARGET)
    room = None if context is None else context - 1
    if room is not None and longest_source + longest_target > room:
        # A limit that was given stays; of two open ones, what the shorter leaves of its half is the other's.
        if source is None and target is None:
            longest_source = min(longest_source, max(room // 2, room - longest_target))
            longest_target = min(longest_target, room - longest_source)
        elif source is None:
            longest_source = max(1, room - longest_target)
        elif target is None:
            longest_target = max(1, room - longest_source)
    return replace(settings, max_source_length=longest_source, max_target_length=longest_target)


def _limit_or(lengths: Sequence[int] | np.ndarray, default: int) -> int:
    return limit_for(np.asarray(lengths)) if len(lengths) else default


def chosen_words(asked: DataSettings, resolved: DataSettings) -> str:
    """Say which lengths the data has told; "" where none was left to it.

    Args:
        asked: the settings as given.
        resolved: with numbers.
    """
    chosen = [f"data.{name}={getattr(resolved, name)}" for name in LENGTHS if getattr(asked, name) is None]
    return f"{' and '.join(chosen)}, by the data" if chosen else ""
