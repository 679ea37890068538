"""The one table helper: parts where a terminal is narrow, no broken figure."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from glmtune.tables import TextTable, latex_document, latex_text


def test_a_table_too_wide_for_the_terminal_is_cut_into_parts_and_no_figure_breaks():
    columns = ("", *(f"benchmark {number} drop" for number in range(9)))
    row = ("int4-g128", *(f"+{number}.25 ({number}.00 to {number}.50)" for number in range(9)))
    table = TextTable("Methods", columns, (row,), "caption")
    parts = table.parts(80)
    assert len(parts) > 1
    assert [part.columns[0] for part in parts] == [""] * len(parts)
    assert [cell for part in parts for cell in part.rows[0][1:]] == list(row[1:])
    printed = io.StringIO()
    table.show(Console(file=printed, width=80))
    assert all(cell in printed.getvalue() for cell in row)
    assert printed.getvalue().count("Methods") == printed.getvalue().count("caption") == 1
    assert table.parts(1000) == [table]
    assert len(table.parts(1)) == len(columns) - 1


def test_rich_prints_a_table_as_it_is_and_words_stay_left():
    table = TextTable(
        "T", ("name", "score", "verdict"), (("a", "1.0", "better"), ("bb", "10.0", "–")), "", ("verdict",)
    )
    printed = io.StringIO()
    Console(file=printed, width=80).print(table)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    assert lines[2] == "  name   score   verdict"
    assert lines[4:6] == ["  a        1.0   better", "  bb      10.0   –"]


def test_latex_has_the_rules_of_booktabs_and_no_mark_of_its_own():
    table = TextTable(
        "Accuracy & drop",
        ("", "C-Eval, %", "verdict"),
        (("int4_g32", "-1.50 ± 0.20", "within #1"),),
        "50 %",
        ("verdict",),
    )
    assert table.to_latex().splitlines() == [
        r"\begin{table}",
        r"  \centering",
        r"  \caption{Accuracy \& drop}",
        r"  \begin{tabular}{lrl}",
        r"    \toprule",
        r"     & C-Eval, \% & verdict \\",
        r"    \midrule",
        r"    int4\_g32 & $-$1.50 $\pm$ 0.20 & within \#1 \\",
        r"    \bottomrule",
        r"  \end{tabular}",
        r"  \par\smallskip\footnotesize 50 \%",
        r"\end{table}",
    ]
    assert latex_document([table, table]).count(r"\begin{table}") == 2


@pytest.mark.parametrize("name", ["[law]", "*law", "* law"])
def test_a_row_is_no_argument_of_the_end_of_the_one_before(name: str):
    """LaTeX looks for `*` and `[` behind a row's end, over blanks and the line's end."""
    rows = TextTable("T", ("name", "n"), (("art", "1"), (name, "2"))).to_latex().splitlines()[7:9]
    assert rows == [r"    art & 1 \\", rf"    {{}}{name} & 2 \\"]


def test_latex_text_keeps_every_letter():
    assert latex_text("a\\b{c}~^<>|_−–→●×…\n客") == (
        r"a\textbackslash{}b\{c\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}|\_$-$--$\rightarrow$"
        r"$\bullet$$\times$\ldots{} 客"
    )
    assert latex_text("GLM-4, 5-shot, 2-3") == "GLM-4, 5-shot, 2-3"
