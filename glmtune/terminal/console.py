"""Rich's console and progress bars for text that may come from anywhere: no markup, no control characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
import rich.progress
from rich.console import ConsoleOptions, RenderableType
from rich.progress import ProgressColumn, TextColumn
from rich.segment import Segment
from rich.text import Text

from glmtune.terminal.text import shown


class Console(rich.console.Console):
    """A console on which text is text: styles are given by `Text`, not by words in brackets."""

    def __init__(self, **options: Any) -> None:
        """Switch markup and emoji codes off.

        Args:
            options: as of rich's console, such as ``stderr=True``.
        """
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Make control characters visible in whatever is printed; the cursor is moved by rich alone.

        Called by rich for all that it prints (rich 13 to 15), text that was laid out before included.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into text; called by rich for every string (`Text` drops some controls unseen)."""
        return super().render_str(shown(text), **options)


class Progress(rich.progress.Progress):
    """Progress bars whose descriptions are text: by itself rich reads markup in them."""

    def __init__(self, *columns: str | ProgressColumn, console: rich.console.Console, **options: Any) -> None:
        """Switch the markup of all columns off.

        Args:
            columns: rich's usual ones by default.
            console: where to.
            options: as of rich's progress bars.
        """
        super().__init__(*columns, console=console, **options)
        for column in self.columns:
            if type(column) is TextColumn:  # subclasses have a markup of their own, around numbers
                column.markup = False

    @classmethod
    def get_default_columns(cls) -> tuple[ProgressColumn, ...]:
        """Return rich's usual columns, the description without the markup that rich puts before it."""
        return (TextColumn("{task.description}"), *super().get_default_columns()[1:])


def plain(text: str, style: str = "") -> Text:
    """Return text as it may be laid out, control characters visible and counted in its width.

    Args:
        text: of whatever origin.
        style: rich's name of a style.
    """
    return Text(shown(text), style=style)
