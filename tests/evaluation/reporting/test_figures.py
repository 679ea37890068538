"""Figures as files: the same bytes each time, and no boxes where a font lacks Chinese."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from evaluation.reporting import figures
from evaluation.reporting.figures import chinese_font, readable, readable_names, save_figure
from glmtune.errors import GlmtuneError


def drawn(title: str = "accuracy") -> Figure:
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [1, 0])
    axes.set_title(title)
    return figure


def test_png_alone_or_with_svg_and_pdf(tmp_path: Path) -> None:
    assert save_figure(drawn(), tmp_path / "a.png") == [tmp_path / "a.png"]
    written = save_figure(drawn(), tmp_path / "b.png", paper=True)
    assert [path.name for path in written] == ["b.png", "b.svg", "b.pdf"]
    assert (tmp_path / "b.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (tmp_path / "b.svg").read_text(encoding="utf-8")
    again = save_figure(drawn(), tmp_path / "c.png", paper=True)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_without_a_chinese_font_names_become_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "chinese_font", lambda: None)
    assert readable_names(["law", "高等数学", "法律"]) == ["law", "no. 2", "no. 3"]
    assert readable("OWN 客服 val: glm-tiny") == "OWN … val: glm-tiny"
    monkeypatch.setattr(figures, "chinese_font", lambda: "Noto Sans CJK SC")
    assert readable_names(["高等数学"]) == ["高等数学"]
    assert readable("客服") == "客服"


def test_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    """Subjects, models and folders are called as their owners like."""
    for text in ("costs in $ and in $", "model $x_$ of mine", r"a\$b_$ and $", "one $"):
        save_figure(drawn(readable(text)), tmp_path / "a.png")
        figure = drawn()
        figure.axes[0].barh(readable_names([text, "law"]), [1, 2])
        save_figure(figure, tmp_path / "b.png")
        assert figure.axes[0].title.get_text() == "accuracy"


def test_a_figure_of_thousands_of_bars_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "HIGHEST", 4.0)
    figure = Figure(figsize=(1, 2000))
    save_figure(figure, tmp_path / "a.png")
    assert figure.get_figheight() == 4.0


@pytest.mark.filterwarnings("error:Glyph")
def test_no_glyph_is_missing_in_what_is_drawn(tmp_path: Path) -> None:
    written = save_figure(drawn(readable("客服, accuracy")), tmp_path / "a.png", paper=True)
    assert sorted(path.suffix for path in written) == [".pdf", ".png", ".svg"]


def test_a_font_is_one_of_this_machine() -> None:
    from matplotlib import font_manager

    found = chinese_font()
    assert found is None or found in {font.name for font in font_manager.fontManager.ttflist}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(GlmtuneError, match=r"absent"):
        save_figure(drawn(), tmp_path / "absent" / "a.png")
