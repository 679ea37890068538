"""Figures as files: PNG always, SVG and PDF for papers, with names that every reader's machine can show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.storage.files import write_atomically, write_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Arial Unicode MS", "Noto Serif CJK SC", "AR PL UMing CN",
)  # fmt: skip
"""Fonts of the usual systems that hold Chinese, sans first; none is fetched."""
_CHINESE = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]+")
PAPER = ("svg", "pdf")
HIGHEST = 500.0
"""Inches of a figure, whose bars may be thousands: a PNG has less than 65,536 pixels at 120 per inch."""


@cache
def chinese_font() -> str | None:
    """Return a font of this machine that holds Chinese; None without any."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CHINESE_FONTS if name in there), None)


def readable(text: str) -> str:
    """Return a text as a figure can show it: without a Chinese font, Chinese becomes an ellipsis.

    Args:
        text: a title.
    """
    shown = text if chinese_font() is not None else _CHINESE.sub("\N{HORIZONTAL ELLIPSIS}", text)
    return _without_formulas(shown)


def _without_formulas(text: str) -> str:
    """Return a text whose dollar signs are shown: between two, matplotlib reads a formula, or fails to."""
    return text.replace("$", r"\$")


def readable_names(names: Iterable[str]) -> list[str]:
    """Return names of bars or curves as a figure can show them.

    Without a Chinese font a name in Chinese becomes its place, ``no. 3``, and so stays one of its own: the
    tables beside the figure have the names in the same order.

    Args:
        names: in their order.
    """
    has_font = chinese_font() is not None
    return [
        f"no. {place}" if not has_font and _CHINESE.search(name) else _without_formulas(name)
        for place, name in enumerate(names, start=1)
    ]


def save_figure(figure: Figure, path: Path, *, paper: bool = False) -> list[Path]:
    """Write a figure so that a reader never sees half of it.

    Args:
        figure: what to write.
        path: of the PNG.
        paper: also as SVG and PDF, beside it.

    Returns:
        The files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    from matplotlib import rc_context

    # No date and no version of matplotlib inside: the same result makes the same bytes. Text stays text in a
    # PDF (type 42, which publishers ask for), and in an SVG becomes outlines, which need no font.
    figure.set_figheight(min(figure.get_figheight(), HIGHEST))
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": "glmtune"},
        "svg": {"Date": None, "Creator": "glmtune"},
        "pdf": {"CreationDate": None, "Creator": "glmtune", "Producer": "glmtune"},
    }
    families = ["DejaVu Sans", *([chinese] if (chinese := chinese_font()) else [])]
    style: dict[Any, Any] = {"svg.hashsalt": "glmtune", "pdf.fonttype": 42, "font.sans-serif": families}
    written = [path, *(path.with_suffix(f".{kind}") for kind in PAPER)] if paper else [path]
    with rc_context(style):
        for each in written:
            kind = each.suffix[1:]
            options: dict[str, Any] = {"format": kind, "dpi": 120, "metadata": metadata[kind]}
            try:
                write_atomically(each, lambda partial, options=options: figure.savefig(partial, **options))
            except OSError as error:
                raise write_error(each, error) from None
    return written
