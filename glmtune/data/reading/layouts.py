"""Detect how rows are laid out and turn them into messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from glmtune.data.reading.json_rows import kind_of
from glmtune.data.reading.message_items import read_message
from glmtune.data.records import RawRow, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.errors import DataError
from glmtune.messages import Message

_DETECTION_ROWS = 20
"""Rows looked at for columns: some leave out what is empty in them, such as a history."""
_ANSWER = "the answer"
_PAIRS = (("prompt", "response"), ("question", "answer"), ("query", "response"), ("prompt", "completion"))


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout and the columns it reads.

    Attributes:
        name: ``columns``, ``adgen``, ``alpaca``, ``sharegpt`` or ``openai``.
        columns: every column the layout reads, required ones first.
        prompt: column of the question (``columns`` and ``adgen``), or of the message list.
        response: column of the answer (``columns`` and ``adgen``).
        history: column of earlier turns, if any.
    """

    name: str
    columns: tuple[str, ...]
    prompt: str
    response: str = ""
    history: str = ""


def detect_layout(rows: Sequence[RawRow], settings: DataSettings, path: str) -> Layout:
    """Choose the layout by the settings or, with ``auto``, by the columns of the first rows.

    Args:
        rows: the rows of the file, at least one.
        settings: ``layout`` and the column names.
        path: the file, for messages.

    Returns:
        The layout.

    Raises:
        DataError: no layout fits, or a named column occurs in none of the first rows; those found are listed.
    """
    columns: dict[str, object] = {}
    for row in rows[:_DETECTION_ROWS]:
        columns.update(
            {name: value for name, value in row.values.items() if value is not None or name not in columns}
        )
    layout = _chosen_layout(columns, settings)
    if layout is None:
        raise DataError(
            f"the layout cannot be told from the columns: {_list(columns)}. Known by their columns are"
            " content/summary (adgen), instruction/output (alpaca), conversations (sharegpt), messages"
            f" (openai) and {', '.join('/'.join(pair) for pair in _PAIRS)}. Set `data.prompt_column` and"
            " `data.response_column`.",
            path=path,
            line=rows[0].line,
        )
    missing = [name for name in layout.columns[: _REQUIRED[layout.name]] if name not in columns]
    missing += [name for name in (settings.history_column,) if name and name not in columns]
    if missing:
        raise DataError(
            f"the column `{missing[0]}` does not occur; the columns are: {_list(columns)}."
            f" {_column_advice(layout)}",
            path=path,
            line=rows[0].line,
        )
    return layout


# How many of a layout's columns, the first ones, must occur; the others are read where they do.
_REQUIRED = {"columns": 2, "adgen": 2, "alpaca": 2, "sharegpt": 1, "openai": 1}


def _chosen_layout(columns: Mapping[str, object], settings: DataSettings) -> Layout | None:
    history = settings.history_column or ("history" if "history" in columns else "")
    if settings.prompt_column and settings.response_column:
        prompt, response, history = (
            settings.prompt_column,
            settings.response_column,
            settings.history_column or "",
        )
        return Layout("columns", (prompt, response, *filter(None, [history])), prompt, response, history)
    if settings.layout != "auto":
        return _fixed_layout(settings.layout, columns)
    # From the most telling to the least: lists of messages before pairs of columns, which other data have,
    # too.
    for name in ("openai", "sharegpt", "adgen", "alpaca"):
        layout = _fixed_layout(name, columns)
        if all(column in columns for column in layout.columns[: _REQUIRED[name]]):
            return layout
    for prompt, response in _PAIRS:
        if prompt in columns and response in columns:
            return Layout("columns", (prompt, response, *filter(None, [history])), prompt, response, history)
    return None


def _fixed_layout(name: str, columns: Mapping[str, object]) -> Layout:
    if name == "adgen":
        return Layout("adgen", ("content", "summary"), "content", "summary")
    if name == "alpaca":
        extra = tuple(column for column in ("input", "history", "system") if column in columns)
        return Layout("alpaca", ("instruction", "output", *extra), "instruction", "output")
    column = "conversations" if name == "sharegpt" else "messages"
    extra = ("system",) if "system" in columns else ()
    return Layout(name, (column, *extra), column)


def _column_advice(layout: Layout) -> str:
    if layout.name == "columns":
        return (
            "Set `data.prompt_column`, `data.response_column` and `data.history_column` to names that occur."
        )
    return f"The layout `{layout.name}` needs it; choose another `data.layout`, or set the column names."


def _list(columns: Mapping[str, object]) -> str:
    return ", ".join(columns) if columns else "none"


def convert(layout: Layout, values: Mapping[str, object], *, need_answer: bool = True) -> tuple[Message, ...]:
    """Turn one row into messages.

    Args:
        layout: from `detect_layout`.
        values: the row.
        need_answer: whether a row without answer is a problem (training) or a question (prediction).

    Returns:
        Messages in the order system, user, assistant, ... ; the last is the answer, if there is one.

    Raises:
        RowProblem: the field, what is wrong with it and what to do.
    """
    messages = _CONVERTERS[layout.name](layout, values, need_answer)
    _check_order(messages, need_answer)
    return tuple(messages)


def _text(values: Mapping[str, object], name: str, what: str, *, required: bool = True) -> str:
    if name not in values:
        if not required:
            return ""
        raise RowProblem(
            f"`{name}` ({what}) is missing; the row has {_list(values)}. Add it or correct its name."
        )
    value = values[name]
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        advice = "Put the number in quotes." if isinstance(value, int | float) else "Give the text itself."
        raise RowProblem(f"`{name}` ({what}) must be a string, but it is {kind_of(value)}. {advice}")
    if required and not value.strip():
        problem = f"`{name}` ({what}) is empty. Fill it in or delete the row."
        raise RowProblem(problem, empty_answer=what == _ANSWER)
    return value


def _from_columns(layout: Layout, values: Mapping[str, object], need_answer: bool) -> list[Message]:
    messages = _history(values.get(layout.history), layout.history) if layout.history else []
    messages.append(Message("user", _text(values, layout.prompt, "the question")))
    answer = _text(values, layout.response, _ANSWER, required=need_answer)
    return [*messages, Message("assistant", answer)] if answer.strip() else messages


def _from_alpaca(layout: Layout, values: Mapping[str, object], need_answer: bool) -> list[Message]:
    system = _text(values, "system", "the system message", required=False)
    messages = [Message("system", system)] if system.strip() else []
    messages += _history(values.get("history"), "history")
    question = _text(values, "instruction", "the instruction")
    extra = _text(values, "input", "the input of the instruction", required=False)
    messages.append(Message("user", f"{question}\n{extra}" if extra.strip() else question))
    answer = _text(values, "output", _ANSWER, required=need_answer)
    return [*messages, Message("assistant", answer)] if answer.strip() else messages


def _history(value: object, name: str) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except ValueError:
            raise RowProblem(
                f"`{name}` (earlier turns) is a string, but no JSON: {value[:40]!r}. Write a list of"
                ' [question, answer] pairs, such as [["Hi", "Hello!"]].'
            ) from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowProblem(f"`{name}` must be a list of [question, answer] pairs, but it is {kind_of(value)}.")
    messages: list[Message] = []
    for number, pair in enumerate(value, start=1):
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        ):
            raise RowProblem(
                f"`{name}` must be a list of [question, answer] pairs, but its item {number} is"
                f" {kind_of(pair)}. Give two strings in each pair."
            )
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _from_messages(layout: Layout, values: Mapping[str, object], need_answer: bool) -> list[Message]:
    name = layout.prompt
    items = values.get(name)
    if isinstance(items, str):
        try:
            items = json.loads(items)
        except ValueError:
            raise RowProblem(
                f"`{name}` is a string, but no JSON: {items[:40]!r}. Give a list of messages."
            ) from None
    if not isinstance(items, list) or not items:
        found = "is missing" if name not in values else f"is {kind_of(items)}"
        raise RowProblem(f"`{name}` must be a non-empty list of messages, but it {found}.")
    system = _text(values, "system", "the system message", required=False)
    messages = [Message("system", system)] if system.strip() else []
    for number, item in enumerate(items):
        messages += read_message(item, f"{name}[{number}]")
    if not need_answer and messages[-1].role == "assistant" and not messages[-1].content.strip():
        messages.pop()
    return messages


def _check_order(messages: Sequence[Message], need_answer: bool) -> None:
    followers = {
        "start": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "observation", "assistant"),
        "observation": ("assistant",),
    }
    if need_answer and len(messages) == 1 and messages[0].role == "assistant" and messages[0].content.strip():
        return  # a text that answers nothing, learnt from its first token
    before = "start"
    for number, message in enumerate(messages, start=1):
        # Two messages of the assistant in a row are one turn only if the first calls a tool.
        follows_call = before != "assistant" or message.role != "assistant" or messages[number - 2].metadata
        if message.role not in followers[before] or not follows_call:
            after = "at the start" if before == "start" else f"after a message from `{before}`"
            raise RowProblem(
                f"message {number} comes from `{message.role}`, but {after}"
                f" {' or '.join(followers[before])} must follow. Merge or reorder the messages."
            )
        if message.role != "observation" and not message.content.strip() and not message.metadata:
            answer = message.role == "assistant" and number == len(messages)
            problem = f"message {number} (from `{message.role}`) is empty. Fill it in or delete the row."
            raise RowProblem(problem, empty_answer=answer)
        before = message.role
    if need_answer and before != "assistant":
        raise RowProblem(
            f"the last message comes from `{before}`, but nothing answers it. Add the answer or delete it."
        )
    if not need_answer and before == "system":
        raise RowProblem("there is a system message but no question. Add a message from the user.")


_CONVERTERS: dict[str, Callable[[Layout, Mapping[str, object], bool], list[Message]]] = {
    "columns": _from_columns,
    "adgen": _from_columns,
    "alpaca": _from_alpaca,
    "sharegpt": _from_messages,
    "openai": _from_messages,
}
