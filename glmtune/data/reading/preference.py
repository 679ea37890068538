"""Rows for preference tuning: two answers of which one is better, or one that was judged.

What is told apart by the columns of the first rows (Q: question, A: answer):

    prompt | chosen | rejected             texts, or lists of messages that begin with the answer (TRL)
    chosen | rejected                      whole conversations, alike up to the last answer (UltraFeedback)
    conversations | chosen | rejected      Q A Q, then one message each (LLaMA-Factory)
    instruction (+ input) | chosen | rejected
    messages | rejected_response           Q A Q A: the last answer is the better one (ms-swift)
    prompt | completion | label            one answer, judged true or false (KTO)
    messages | label, or kto_tag           Q A, judged
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from glmtune.data.reading.json_values import kind_of, listed, read_text, text_of
from glmtune.data.reading.layouts import (
    DETECTION_ROWS,
    Layout,
    check_order,
    earlier_turns,
    message_list,
    text_field,
    with_system_and_tools,
)
from glmtune.data.reading.message_items import read_message
from glmtune.data.records import RawRow, RowProblem
from glmtune.data.settings import PREFERENCE, DataSettings
from glmtune.errors import DataError
from glmtune.messages import Message

_LISTS = ("messages", "conversations")
_PROMPTS = (*_LISTS, "prompt", "instruction", "question", "query", "input")
_REJECTED = ("rejected", "rejected_response")
_LABELS = ("label", "kto_tag")
_JUDGED = ("completion", "response", "output", "answer")
_BESIDE = ("system", "tools", "history")
_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass(frozen=True, slots=True)
class Judged:
    """What a row says.

    Attributes:
        messages: the prompt, and the answer that is better or was judged.
        rejected: the worse answer, None where one answer was judged.
        desirable: the judgement, None where there are two answers.
    """

    messages: tuple[Message, ...]
    rejected: Message | None = None
    desirable: bool | None = None


def preference_columns(settings: DataSettings) -> frozenset[str]:
    """Return every column that this layout may read."""
    named = (
        settings.prompt_column,
        settings.response_column,
        settings.history_column,
        settings.rejected_column,
    )
    return frozenset(
        {"chosen", *_PROMPTS, *_REJECTED, *_LABELS, *_JUDGED, *_BESIDE} | {name for name in named if name}
    )


def detect_preference(
    rows: Sequence[RawRow], settings: DataSettings, path: str, *, names: Sequence[str] = ()
) -> Layout:
    """Find the columns of prompts, answers and judgements in the first rows of a file.

    Args:
        rows: the rows of the file, at least one.
        settings: the column names, as far as they are given.
        path: the file, for messages.
        names: of columns that the file has besides those in its rows.

    Raises:
        DataError: there are no two answers and no judged one, or a named column does not occur.
    """
    columns: dict[str, object] = dict.fromkeys(names, cast(object, None))
    for row in rows[:DETECTION_ROWS]:
        columns |= {
            name: value for name, value in row.values.items() if value is not None or name not in columns
        }
    for name in (
        settings.prompt_column,
        settings.response_column,
        settings.rejected_column,
        settings.history_column,
    ):
        if name and name not in columns:
            raise DataError(
                f"the column `{name}` does not occur; the columns are: {listed(columns)}. Name those of the"
                " prompt, the better and the worse answer: `data.prompt_column`, `data.response_column` and"
                " `data.rejected_column`.",
                path=path,
                line=rows[0].line,
            )

    def first(candidates: Sequence[str]) -> str:
        return next((name for name in candidates if name in columns), "")

    rejected = settings.rejected_column or first(_REJECTED)
    label = "" if rejected else first(_LABELS)
    response = settings.response_column or first(("chosen",) if rejected else ("chosen", *_JUDGED))
    prompt = settings.prompt_column or first([name for name in _PROMPTS if name not in (response, rejected)])
    is_whole = prompt in _LISTS or (response and isinstance(_unpacked(columns[response]), list))
    if not (rejected or label) or not (response or prompt in _LISTS) or not (prompt or is_whole):
        raise DataError(
            f"no preferences can be told from the columns: {listed(columns)}. Pairs are `prompt`, `chosen`"
            " and `rejected` (texts or messages; whole conversations need no prompt), `conversations` beside"
            " `chosen` and `rejected`, or `messages` and `rejected_response`; single answers are `prompt`,"
            " `completion` and `label`. Rename the columns, or name them: `data.prompt_column`,"
            " `data.response_column` and `data.rejected_column`.",
            path=path,
            line=rows[0].line,
        )
    beside = [name for name in _BESIDE if name in columns]
    history = settings.history_column or ("history" if "history" in beside else "")
    extra = ["input"] if prompt == "instruction" and "input" in columns else []
    read = dict.fromkeys([prompt, response, rejected, label, history, *extra, *beside])
    return Layout(
        PREFERENCE, tuple(name for name in read if name), prompt, response, history, rejected, label
    )


def convert_preference(layout: Layout, values: Mapping[str, object], *, need_answer: bool = True) -> Judged:
    """Turn one row into a prompt and its answers.

    Args:
        layout: from `detect_preference`.
        values: the row.
        need_answer: whether a row must have its answers (training); else what there is is a question with
            the better answer as its reference.

    Raises:
        RowProblem: the field, what is wrong with it and what to do.
    """
    before = _before(layout, values)
    if not need_answer and not (layout.response and values.get(layout.response)):
        messages = before or _answered(before, values, layout.response)
        check_order(messages, need_answer=False)
        return Judged(tuple(messages))
    # Without a column of its own the better answer is the last message of the list.
    messages = _answered(before, values, layout.response) if layout.response else before
    messages = _beside(messages, values)
    check_order(messages, need_answer=True)
    if not need_answer:
        return Judged(tuple(messages))
    if layout.label:
        return Judged(tuple(messages), desirable=_judgement(values, layout.label))
    prompt = before if layout.response else before[:-1]
    other = _beside(_answered(prompt, values, layout.rejected), values)
    return Judged(tuple(messages), _compared(messages, other, layout))


def _before(layout: Layout, values: Mapping[str, object]) -> list[Message]:
    """Return the messages of the prompt's column: a conversation, or the question with its history."""
    if not layout.prompt:
        return []
    if isinstance(_unpacked(values.get(layout.prompt)), list):
        return message_list(values, layout.prompt)
    messages = earlier_turns(values.get(layout.history), layout.history) if layout.history else []
    if layout.prompt != "instruction":
        return [*messages, Message("user", text_field(values, layout.prompt, "the question"))]
    extra = text_field(values, "input", "the input of the instruction", required=False)
    question = text_field(values, "instruction", "the instruction", required=not extra.strip())
    return [*messages, Message("user", "\n".join(part for part in (question, extra) if part.strip()))]


def _answered(before: list[Message], values: Mapping[str, object], name: str) -> list[Message]:
    """Return a prompt with the answer of a column: a text, a message, or messages, perhaps all of them."""
    value = _unpacked(values.get(name))
    if isinstance(value, dict):
        return [*before, *read_message(value, name)]
    if not isinstance(value, list):
        return [*before, Message("assistant", text_field(values, name, "the answer"))]
    messages = message_list(values, name)
    if messages[0].role == "assistant":
        return [*before, *messages]
    return messages  # the whole conversation, its prompt included


def _beside(messages: list[Message], values: Mapping[str, object]) -> list[Message]:
    return with_system_and_tools(messages, values) if messages else messages


def _compared(messages: list[Message], other: list[Message], layout: Layout) -> Message:
    """Return the worse answer; the prompt of both must be one, and the answers two."""
    chosen, rejected = layout.response or layout.prompt, layout.rejected
    check_order(other, need_answer=True)
    if messages[:-1] != other[:-1]:
        raise RowProblem(
            f"`{chosen}` and `{rejected}` differ before their last answers ({len(messages)} and {len(other)}"
            " messages), but two answers are compared to one prompt. Cut both behind the first answer that"
            " differs, or delete the row."
        )
    if messages[-1] == other[-1]:
        raise RowProblem(
            f"`{chosen}` and `{rejected}` are the same answer, so neither is preferred. Delete the row."
        )
    return other[-1]


def _judgement(values: Mapping[str, object], name: str) -> bool:
    value = values.get(name)
    said = value if isinstance(value, bool) else _TRUTHS.get((text_of(value) or "").strip().lower())
    if said is None:
        found = "is missing" if value is None else f"is {kind_of(value)}"
        raise RowProblem(
            f"`{name}` {found}, but an answer is desirable or it is not: true or false (1 or 0). Correct it,"
            " or delete the row."
        )
    return said


def _unpacked(value: object) -> object:
    """Return the messages that a text is the JSON of, as tables hold them; anything else as it is.

    An answer may be JSON, too, so only objects with a role count.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = read_text(value)
    except (ValueError, RowProblem):
        return value
    items = found if isinstance(found, list) else [found]
    are_messages = all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in items)
    return found if items and are_messages else value
