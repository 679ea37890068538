"""Tables of a result, once as rows of text, then for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.metrics import MACRO, MICRO, Score, interval
from evaluation.reporting.published import PublishedRow
from evaluation.reporting.results import Result

if TYPE_CHECKING:
    import rich.console
    import rich.table

NOTHING = "–"
NAME_WIDTH = 12
WIDEST_CELL = 28
PADDING = 3  # a blank on each side and the box
TEXT_COLUMNS = ("", "rule", "how it reads", "subject", "benchmark", "protocol")
AVERAGES = {MICRO: "micro average", MACRO: "macro average"}


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table whose cells are text.

    Attributes:
        title: above it.
        columns: headings; all but the first are right-aligned.
        rows: as many cells each.
        caption: below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def to_rich(self) -> rich.table.Table:
        """Lay the table out for a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(self.title) if self.title else None,
            title_justify="left",
            caption=Text(self.caption) if self.caption else None,
            caption_justify="left",
            box=SIMPLE_HEAD,
        )
        for number, heading in enumerate(self.columns):
            is_text = heading in TEXT_COLUMNS
            table.add_column(
                Text(heading),
                justify="left" if is_text else "right",
                overflow="fold",
                min_width=self._name_width() if number == 0 else None,
            )
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
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


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def percent(value: float | None) -> str:
    """Write a fraction as a percentage with two decimals.

    >>> percent(0.53566), percent(None)
    ('53.57', '–')
    """
    return NOTHING if value is None else f"{100 * value:.2f}"


def average_table(result: Result, published: PublishedRow | None) -> TextTable:
    """Lay out the averages: both of them, those of the benchmark, and the categories; published ones beside.

    Args:
        result: of a run.
        published: the published row of the same model, if there is one and the two may be compared.
    """
    summary, known = result.summary, result.task.labelled
    rows: list[tuple[str, Score]] = [
        (_readable(MICRO), summary.micro),
        (_readable(MACRO), summary.macro),
    ]
    if summary.headline != MICRO:
        rows.reverse()
    rows += list(summary.categories.items())
    rows += [(_readable(name), score) for name, score in summary.further.items()]
    columns = ("", "n", "accuracy, %", "95 % interval", "unparsed", "truncated")
    cells = [
        (
            name,
            f"{score.num_samples:,}",
            percent(score.accuracy) if known else NOTHING,
            _interval(score) if known else NOTHING,
            f"{score.num_unparsed:,}",
            f"{score.num_truncated:,}",
        )
        for name, score in rows
    ]
    caption = _caption(result)
    if published is not None:
        columns = (*columns, "published")
        values = {_readable(published.average_name): published.average, **published.categories}
        cells = [(*row, _published(values.get(row[0]))) for row in cells]
        caption = "\n".join(filter(None, [caption, f"Published: {published.source} ({published.note})."]))
    return TextTable(result.title, columns, tuple(cells), caption)


def _published(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def rules_table(result: Result) -> TextTable:
    """Lay out the accuracy under every rule of extraction, from the same answers.

    Args:
        result: of a run.
    """
    known = result.task.labelled
    rows = tuple(
        (
            f"{name} (deciding)" if name == result.rule else name,
            percent(summary.micro.accuracy) if known else NOTHING,
            percent(summary.macro.accuracy) if known else NOTHING,
            f"{summary.micro.num_unparsed:,}",
            result.task.rules[name].about,
        )
        for name, summary in result.summaries.items()
    )
    return TextTable(
        "Rules, same answers", ("rule", "micro, %", "macro, %", "unparsed", "how it reads"), rows
    )


def subject_table(result: Result) -> TextTable:
    """Lay out every subject.

    Args:
        result: of a run.
    """
    known = result.task.labelled
    rows = tuple(
        (
            name,
            f"{score.num_samples:,}",
            percent(score.accuracy) if known else NOTHING,
            _interval(score) if known else NOTHING,
            f"{score.num_unparsed:,}",
            f"{score.num_truncated:,}",
        )
        for name, score in result.summary.subjects.items()
    )
    columns = ("subject", "n", "accuracy, %", "95 % interval", "unparsed", "truncated")
    return TextTable("Subjects", columns, rows)


def _interval(score: Score) -> str:
    if score.stderr is None:
        return NOTHING
    low, high = interval(score)
    return f"{100 * low:.2f}–{100 * high:.2f}"


def _readable(name: str) -> str:
    return AVERAGES.get(name, name.removeprefix("accuracy_").replace("_", " "))


def _caption(result: Result) -> str:
    notes: list[str] = []
    if result.num_shortened:
        notes.append(f"{result.num_shortened:,} prompts lost exemplars to fit the model's context")
    if result.num_too_long:
        notes.append(
            f"{result.num_too_long:,} questions fit no context of the model: not asked, counted as unparsed"
        )
    if not result.task.labelled:
        notes.append("this split has no public answers: submission.json is what the server scores")
    elif not result.is_comparable:
        notes.append("not comparable with published figures")
    return "; ".join(notes)
