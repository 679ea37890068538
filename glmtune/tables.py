"""Tables of text, laid out for a terminal or as Markdown: what every report here is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console
    import rich.table
    import rich.text

NAME_WIDTH = 12
"""Names are not broken below this width, however narrow the terminal."""
WIDEST_CELL = 28
"""Longer cells are folded rather than given a part of their own."""
PADDING = 3  # a blank on each side and the box


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table whose cells are text.

    Attributes:
        title: above it.
        columns: headings; the first column holds names, the others figures, which are right-aligned.
        rows: as many cells each.
        caption: below it.
        text_columns: headings of further columns that hold words.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    text_columns: tuple[str, ...] = ()

    def __rich__(self) -> rich.table.Table:
        """Let rich's ``console.print`` take the table as it is; called by rich for any object it prints."""
        return self.to_rich()

    def to_rich(self) -> rich.table.Table:
        """Lay the table out for a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        from glmtune.terminal.console import plain

        table = Table(
            title=plain(self.title) if self.title else None,
            title_justify="left",
            caption=plain(self.caption) if self.caption else None,
            caption_justify="left",
            box=SIMPLE_HEAD,
        )
        for number, heading in enumerate(self.columns):
            is_text = number == 0 or heading in self.text_columns
            table.add_column(
                plain(heading),
                justify="left" if is_text else "right",
                overflow="fold",
                min_width=self._name_width() if number == 0 else None,
            )
        for row in self.rows:
            table.add_row(*(plain(cell) for cell in row))
        return table

    def _name_width(self) -> int:
        """Keep names readable where a terminal is narrow; numbers have no blanks and never break."""
        return min(NAME_WIDTH, max((len(row[0]) for row in self.rows), default=0))

    def show(self, console: rich.console.Console) -> None:
        """Print the table; one too wide for the console goes out in parts, each with the names in front.

        Args:
            console: where to.
        """
        for part in self.parts(console.width):
            console.print(part.to_rich())

    def parts(self, width: int) -> list[TextTable]:
        """Cut the table into parts that a terminal has room for.

        Args:
            width: of the terminal, in characters.

        Returns:
            Tables with the first column repeated; title on the first, caption on the last. At least one
            further column stands in each, however narrow the terminal.
        """
        # Columns go into the current part while there is room; rich would squeeze them until figures break.
        groups: list[list[int]] = [[]]
        used = first = self._column_width(0)
        for column in range(1, len(self.columns)):
            if groups[-1] and used + self._column_width(column) >= width:
                groups.append([])
                used = first
            groups[-1].append(column)
            used += self._column_width(column)
        last = len(groups) - 1
        return [
            TextTable(
                self.title if number == 0 else "",
                tuple(self.columns[column] for column in (0, *group)),
                tuple(tuple(row[column] for column in (0, *group)) for row in self.rows),
                self.caption if number == last else "",
                self.text_columns,
            )
            for number, group in enumerate(groups)
        ]

    def _column_width(self, column: int) -> int:
        """Return the characters a column needs with padding: headings break at blanks, short cells do not."""
        heading = max(map(len, self.columns[column].split()), default=0)
        cells = (len(row[column]) for row in self.rows)
        return max(heading, *(min(cell, WIDEST_CELL) for cell in cells), 0) + PADDING

    def to_markdown(self) -> str:
        """Write the table as Markdown, its title as a heading."""
        lines = [f"## {self.title}", "", _markdown_row(self.columns)]
        lines.append(_markdown_row(["---", *["---:"] * (len(self.columns) - 1)]))
        lines += [_markdown_row(row) for row in self.rows]
        return "\n".join([*lines, "", *([self.caption, ""] if self.caption else [])])

    def to_latex(self) -> str:
        """Write the table for LaTeX, with the rules of booktabs; the title is its caption."""
        kinds = "".join(
            "l" if number == 0 or heading in self.text_columns else "r"
            for number, heading in enumerate(self.columns)
        )
        lines = [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{latex_text(self.title)}}}",
            rf"  \begin{{tabular}}{{{kinds}}}",
            r"    \toprule",
            f"    {_latex_row(self.columns)}",
            r"    \midrule",
            *(f"    {_latex_row(row)}" for row in self.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            *([rf"  \par\smallskip\footnotesize {latex_text(self.caption)}"] if self.caption else []),
            r"\end{table}",
        ]
        return "\n".join([*lines, ""])


LATEX_MARKS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "±": r"$\pm$", "−": "$-$", "–": "--", "→": r"$\rightarrow$",
    "●": r"$\bullet$", "×": r"$\times$", "…": r"\ldots{}", "\n": " ",
}  # fmt: skip
"""Characters that LaTeX reads otherwise, or that its usual fonts lack."""


def latex_text(text: str) -> str:
    r"""Write a text so that LaTeX sets it as it is; a sign in front of a number becomes a minus.

    >>> latex_text("drop, % (-0.5 to +1)")
    'drop, \\% ($-$0.5 to +1)'
    """
    signed = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return "".join(LATEX_MARKS.get(letter, letter) for letter in signed)


def latex_document(tables: Iterable[TextTable]) -> str:
    r"""Write tables one after the other, to be taken into a paper with ``\input``.

    Args:
        tables: in their order.
    """
    needs = "% Needs \\usepackage{booktabs}; Chinese needs XeLaTeX or LuaLaTeX with a font that has it."
    return "\n".join([needs, "", *(table.to_latex() for table in tables)])


def named_values(rows: Iterable[tuple[str, str | rich.text.Text]], *, title: str = "") -> rich.table.Table:
    """Lay out values with a name before each, for a terminal: no headings, nothing read as markup.

    Args:
        rows: name and value, in order.
        title: above them.
    """
    from rich.table import Table

    from glmtune.terminal.console import plain

    table = Table(title=plain(title) if title else None, title_justify="left", box=None, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(plain(name), plain(value) if isinstance(value, str) else value)
    return table


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(map(latex_text, cells)) + r" \\"
    # Behind the `\\` of the row before, these two would be an argument of it, whatever blanks are between.
    return "{}" + row if row.startswith(("[", "*")) else row


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
