"""Detect how rows are laid out and turn them into messages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from glmtune.data.reading.json_values import kind_of, listed, read_text, text_of
from glmtune.data.reading.message_items import read_message
from glmtune.data.records import RawRow, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates.tool_calls import read_tools

logger = logging.getLogger(__name__)

DETECTION_ROWS = 20
"""Rows looked at for columns: some leave out what is empty in them, such as a history."""
_ANSWER = "the answer"
_PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "completion"),
    ("input", "output"),  # alpaca's, without its instruction
)
_QUESTIONS = ("content", "instruction", "prompt", "question", "query", "input")


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout and the columns it reads.

    Attributes:
        name: ``columns``, ``adgen``, ``alpaca``, ``sharegpt``, ``openai`` or ``preference``.
        columns: every column the layout reads, required ones first.
        prompt: column of the question (``columns`` and ``adgen``), or of the message list.
        response: column of the answer (``columns`` and ``adgen``); empty where the file has questions only.
        history: column of earlier turns, if any.
        rejected: column of the answer that is worse (``preference``), if any.
        label: column that judges the answer (``preference``), if any.
    """

    name: str
    columns: tuple[str, ...]
    prompt: str
    response: str = ""
    history: str = ""
    rejected: str = ""
    label: str = ""


def read_columns(settings: DataSettings) -> frozenset[str]:
    """Return every column that some layout reads; the others of a wide table need not be looked at."""
    named = (settings.prompt_column, settings.response_column, settings.history_column)
    return frozenset(
        {"content", "summary", "instruction", "input", "output", "history", "system"}
        | {"conversations", "messages"}
        | {name for pair in _PAIRS for name in pair}
        | {name for name in named if name}
    )


def detect_layout(
    rows: Sequence[RawRow],
    settings: DataSettings,
    path: str,
    *,
    names: Sequence[str] = (),
    need_answers: bool = True,
) -> Layout:
    """Choose the layout by the settings or, with ``auto``, by the columns of the first rows.

    Args:
        rows: the rows of the file, at least one.
        settings: ``layout`` and the column names.
        path: the file, for messages.
        names: of columns that the file has besides those in its rows.
        need_answers: whether the column of the answer must occur (training), or questions do (prediction).

    Returns:
        The layout.

    Raises:
        ConfigError: the column of the question is named, but not that of the answer.
        DataError: no layout fits, or a named column occurs in none of the first rows; those found are listed.
    """
    columns: dict[str, object] = {}
    for row in rows[:DETECTION_ROWS]:
        columns.update(
            {name: value for name, value in row.values.items() if value is not None or name not in columns}
        )
    if need_answers:
        settings.check_answers()
    layout = _chosen_layout(columns, settings)
    columns = dict.fromkeys(names) | columns
    if not need_answers:
        layout = _without_answers(layout, columns, settings, path)
    if layout is None:
        raise DataError(
            f"the layout cannot be told from the columns: {listed(columns)}. Known by their columns are"
            " content/summary (adgen), instruction/output (alpaca), conversations (sharegpt), messages"
            f" (openai) and {', '.join('/'.join(pair) for pair in _PAIRS)}. Set `data.prompt_column` and"
            " `data.response_column`."
            + " These look like preference pairs, which `+recipe=dpo` learns."
            * ("rejected" in columns),
            path=path,
            line=rows[0].line,
        ).see("layout")
    required = _REQUIRED[layout.name] if need_answers else 1
    missing = [name for name in layout.columns[:required] if name not in columns]
    missing += [name for name in (settings.history_column,) if name and name not in columns]
    if missing:
        raise DataError(
            f"the column `{missing[0]}` does not occur; the columns are: {listed(columns)}."
            f" {_column_advice(layout)}",
            path=path,
            line=rows[0].line,
        )
    return layout


# How many of a layout's columns, the first ones, must occur; the others are read where they do.
_REQUIRED = {"columns": 2, "adgen": 2, "alpaca": 2, "sharegpt": 1, "openai": 1}


def _chosen_layout(columns: Mapping[str, object], settings: DataSettings) -> Layout | None:
    history = settings.history_column or ("history" if "history" in columns else "")
    if settings.prompt_column:
        return _by_columns(
            settings.prompt_column, settings.response_column or "", settings.history_column or ""
        )
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
            return _by_columns(prompt, response, history)
    return None


def _by_columns(prompt: str, response: str, history: str) -> Layout:
    columns = tuple(name for name in (prompt, response, history) if name)
    return Layout("columns", columns, prompt, response, history)


def _without_answers(
    layout: Layout | None, columns: Mapping[str, object], settings: DataSettings, path: str
) -> Layout | None:
    """Return the layout of a file that may hold questions only."""
    if layout is None:
        only = next(iter(columns)) if len(columns) == 1 and settings.layout == "auto" else None
        question = next((name for name in _QUESTIONS if name in columns), only)
        if question is None:
            return None
        if question in ("content", "instruction"):
            return _fixed_layout("adgen" if question == "content" else "alpaca", columns)
        return _by_columns(question, "", "history" if "history" in columns else "")
    if layout.name == "columns" and layout.response and layout.response not in columns:
        # A run's settings name the column of its answers, which a file of questions lacks; so does a typing
        # error, so it is said.
        logger.warning(
            "%s: the column `%s` does not occur, so the rows are questions without answers.",
            path, layout.response,
        )  # fmt: skip
        return _by_columns(layout.prompt, "", layout.history)
    return layout


def _fixed_layout(name: str, columns: Mapping[str, object]) -> Layout:
    if name == "adgen":
        return Layout("adgen", ("content", "summary"), "content", "summary")
    if name == "alpaca":
        extra = tuple(column for column in ("input", "history", "system") if column in columns)
        return Layout("alpaca", ("instruction", "output", *extra), "instruction", "output")
    column = "conversations" if name == "sharegpt" else "messages"
    extra = tuple(column for column in ("system", "tools") if column in columns)
    return Layout(name, (column, *extra), column)


def _column_advice(layout: Layout) -> str:
    if layout.name == "columns":
        return (
            "Set `data.prompt_column`, `data.response_column` and `data.history_column` to names that occur."
        )
    return f"The layout `{layout.name}` needs it; choose another `data.layout`, or set the column names."


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
    check_order(messages, need_answer)
    return tuple(messages)


def text_field(values: Mapping[str, object], name: str, what: str, *, required: bool = True) -> str:
    """Return the text of a column.

    Args:
        values: the row.
        name: of the column.
        what: stands in it, in words.
        required: whether it may not be missing or empty.

    Raises:
        RowProblem: it is, or is no text.
    """
    if name not in values:
        if not required:
            return ""
        raise RowProblem(
            f"`{name}` ({what}) is missing; the row has {listed(values)}. Add it or correct its name."
        )
    value = values[name]
    is_nan = isinstance(value, float) and value != value  # how pandas writes a cell that is missing
    if (value is None or is_nan) and not required:
        return ""
    text = text_of(value)
    if text is None:
        raise RowProblem(
            f"`{name}` ({what}) must be a string, but it is {kind_of(value)}. Give the text itself."
        )
    if required and not text.strip():
        problem = f"`{name}` ({what}) is empty. Fill it in or delete the row."
        raise RowProblem(problem, empty_answer=what == _ANSWER)
    return text


def number_columns(layout: Layout, values: Mapping[str, object]) -> Iterator[str]:
    """Yield where a row has numbers or truth values that are read as their text.

    Args:
        layout: of the file.
        values: the row.
    """
    for name in layout.columns:
        value = values.get(name)
        if isinstance(value, list | tuple) and name == layout.prompt:
            items = [item.get("content", item.get("value")) for item in value if isinstance(item, dict)]
            if any(_is_number(item) for item in items):
                yield f"{name}[].content"
        elif _is_number(value):
            yield name


def _is_number(value: object) -> bool:
    return not isinstance(value, str) and text_of(value) is not None


def _from_columns(layout: Layout, values: Mapping[str, object], need_answer: bool) -> list[Message]:
    messages = earlier_turns(values.get(layout.history), layout.history) if layout.history else []
    messages.append(Message("user", text_field(values, layout.prompt, "the question")))
    answer = text_field(values, layout.response, _ANSWER, required=need_answer) if layout.response else ""
    return [*messages, Message("assistant", answer)] if answer.strip() else messages


def _from_alpaca(layout: Layout, values: Mapping[str, object], need_answer: bool) -> list[Message]:
    system = text_field(values, "system", "the system message", required=False)
    messages = [Message("system", system)] if system.strip() else []
    messages += earlier_turns(values.get("history"), "history")
    extra = text_field(values, "input", "the input of the instruction", required=False)
    # An input alone is a question, too: many sets leave the instruction empty where there is nothing to say.
    question = text_field(values, "instruction", "the instruction", required=not extra.strip())
    messages.append(Message("user", "\n".join(part for part in (question, extra) if part.strip())))
    answer = text_field(values, "output", _ANSWER, required=need_answer)
    return [*messages, Message("assistant", answer)] if answer.strip() else messages


def earlier_turns(value: object, name: str) -> list[Message]:
    """Return the turns before a question, of a list of [question, answer] pairs or its JSON.

    Args:
        value: of the column.
        name: of the column.

    Raises:
        RowProblem: it is something else.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = read_text(value)
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
        texts = [text_of(part) for part in pair] if isinstance(pair, list | tuple) else []
        if len(texts) != 2 or texts[0] is None or texts[1] is None:
            raise RowProblem(
                f"`{name}` must be a list of [question, answer] pairs, but its item {number} is"
                f" {kind_of(pair)}. Give two strings in each pair."
            )
        messages += [Message("user", texts[0]), Message("assistant", texts[1])]
    return messages


def message_list(values: Mapping[str, object], name: str) -> list[Message]:
    """Return the messages of a column that holds a list of them, or its JSON.

    Args:
        values: the row.
        name: of the column.

    Raises:
        RowProblem: it is no such list, or one of its items is no message.
    """
    items = values.get(name)
    if isinstance(items, str):
        try:
            items = read_text(items)
        except ValueError:
            raise RowProblem(
                f"`{name}` is a string, but no JSON: {items[:40]!r}. Give a list of messages."
            ) from None
    if not isinstance(items, list) or not items:
        found = "is missing" if name not in values else f"is {kind_of(items)}"
        raise RowProblem(f"`{name}` must be a non-empty list of messages, but it {found}.")
    return [
        message for number, item in enumerate(items) for message in read_message(item, f"{name}[{number}]")
    ]


def _from_messages(layout: Layout, values: Mapping[str, object], need_answer: bool) -> list[Message]:
    messages = with_system_and_tools(message_list(values, layout.prompt), values)
    if not need_answer and messages[-1].role == "assistant" and not messages[-1].content.strip():
        messages.pop()
    return messages


def with_system_and_tools(messages: list[Message], values: Mapping[str, object]) -> list[Message]:
    """Put what stands beside the list, a system message and tools, in front of it or into its own one.

    Args:
        messages: at least one.
        values: the row.

    Raises:
        RowProblem: there is something else there, or tools in both places.
    """
    system = text_field(values, "system", "the system message", required=False)
    if system.strip():
        messages = [Message("system", system), *messages]
    try:
        tools = read_tools(values.get("tools"), "tools")
    except DataError as error:
        raise RowProblem(str(error)) from None
    if not tools:
        return messages
    if messages[0].role != "system":
        return [Message("system", "", tools=tools), *messages]
    if messages[0].tools:
        raise RowProblem("`tools` stand beside the messages and in the system message. Keep one of the two.")
    return [replace(messages[0], tools=tools), *messages[1:]]


def check_order(messages: Sequence[Message], need_answer: bool) -> None:
    """Make sure that messages follow each other as in a conversation, and say something.

    Args:
        messages: of a row.
        need_answer: whether the last one must be an answer.

    Raises:
        RowProblem: which message does not, and what should stand there.
    """
    followers = {
        "start": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "observation", "assistant"),
        "observation": ("assistant", "observation"),  # calls side by side have a result each
    }
    if need_answer and len(messages) == 1 and messages[0].role == "assistant" and messages[0].content.strip():
        return  # a text that answers nothing, learnt from its first token
    before = "start"
    for number, message in enumerate(messages, start=1):
        # Two messages of the assistant in a row are one turn only if one of them calls a tool.
        follows_call = (
            before != "assistant"
            or message.role != "assistant"
            or messages[number - 2].metadata
            or message.metadata
        )
        if message.role not in followers[before] or not follows_call:
            after = "at the start" if before == "start" else f"after a message from `{before}`"
            raise RowProblem(
                f"message {number} comes from `{message.role}`, but {after}"
                f" {' or '.join(followers[before])} must follow. Merge or reorder the messages."
            )
        says_something = message.content.strip() or message.metadata or message.tools
        if message.role != "observation" and not says_something:
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
