"""The files that every table of a comparison is: Markdown to read, JSON to go on with, LaTeX for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glmtune.storage.files import write_text_atomically
from glmtune.tables import TextTable, latex_document


def write_tables(
    folder: Path,
    title: str,
    tables: Sequence[TextTable],
    values: str,
    *,
    markdown: str,
    json: str,
    latex: str | None,
) -> list[Path]:
    """Write tables in up to three ways.

    Args:
        folder: is there.
        title: above the tables.
        tables: in order.
        values: text of the JSON file.
        markdown: name of that file.
        json: name of that file.
        latex: name of that file; None writes none.

    Returns:
        The files, the most useful first.

    Raises:
        GlmtuneError: one cannot be written.
    """
    texts = {
        json: values,  # first: a folder is known as ours by it, should the next one not be written
        markdown: "\n".join([f"# {title}", "", *(table.to_markdown() for table in tables)]),
    }
    if latex is not None:
        texts[latex] = latex_document(tables)
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    return [folder / name for name in (markdown, *(name for name in texts if name != markdown))]
