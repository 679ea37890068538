"""General prompts, from a shipped set or a file: what a tuned model is still to answer as its base does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmtune.data.reading.archives import archive_of
from glmtune.data.reading.layouts import convert, detect_layout
from glmtune.data.reading.readers import is_hub_id, nearest_files, read_rows
from glmtune.data.reading.shipped import PREFIX, resolve_shipped
from glmtune.data.records import BadRow, Conversation, RawRow, RowProblem, bad_rows_error
from glmtune.data.settings import DataSettings
from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.retention.settings import SHIPPED

FILE = "prompts.jsonl"
"""Of a shipped set, in its folder."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One general prompt.

    Attributes:
        messages: as everywhere: an optional system message, earlier turns, and last the message to answer.
        category: what kind it is, as its row says: chat, facts, arithmetic, instructions, code, refusal; "".
        language: as its row says: zh, en; "".
    """

    messages: tuple[Message, ...]
    category: str = ""
    language: str = ""


def load_prompts(where: str, *, shipped: str, limit: int | None = None) -> list[Prompt]:
    """Read general prompts.

    Args:
        where: ``shipped``; or a file of rows in any layout of ``data=`` (also ``shipped:...``), whose answers
            count for nothing.
        shipped: what reads them, ``retain`` or ``retention``: name of the setting, and of the folder of the
            shipped set.
        limit: most prompts; taken evenly from the whole file, as files are sorted by category. None: all.

    Returns:
        At least one prompt, in file order.

    Raises:
        DataError: the file is nowhere or cannot be read, holds no row, or rows that are no prompts; all of
            them are named.
    """
    name = f"{PREFIX}{shipped}/{FILE}" if where == SHIPPED else where
    source = str(resolve_shipped(name) if name.startswith(PREFIX) else Path(name).expanduser())
    if not (Path(source).exists() or archive_of(Path(source)) or is_hub_id(source)):
        near = nearest_files(Path(source))
        raise DataError(f"there is no such file (`{shipped}.prompts`).{near}", path=source)
    table = read_rows(source)
    if not table.rows and not table.bad:
        raise DataError(f"it holds no row, but `{shipped}.prompts` needs at least one prompt.", path=source)
    settings, found = DataSettings(), list[Prompt]()
    bad = list(table.bad)
    if table.rows:
        layout = detect_layout(table.rows, settings, source, names=table.columns, need_answers=False)
        for row in table.rows:
            try:
                messages = convert(layout, row.values, need_answer=False)
            except RowProblem as problem:
                bad.append(BadRow(row.line, str(problem)))
            else:
                found.append(_prompt(Conversation(messages, source, row.line), row))
    if bad:
        way_out = f"Correct the file, or name another one as `{shipped}.prompts`."
        raise bad_rows_error(
            source, sorted(bad, key=lambda row: row.line), len(bad) + len(found), way_out=way_out
        )
    return spread(found, limit)


def _prompt(row: Conversation, raw: RawRow) -> Prompt:
    category, language = (raw.values.get(name) for name in ("category", "language"))
    return Prompt(
        row.prompt,
        category if isinstance(category, str) else "",
        language if isinstance(language, str) else "",
    )


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Take so many prompts from equal distances of a list.

    Args:
        prompts: any number.
        limit: most of them; None: all.

    >>> [prompt.category for prompt in spread([Prompt((), name) for name in "abcdef"], 3)]
    ['a', 'c', 'e']
    """
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[place * len(prompts) // limit] for place in range(limit)]
