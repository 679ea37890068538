"""A dial for readers: its table, its picture, the strength that a rule would choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glmtune.dial.points import PICTURE_FILE, RESULTS_FILE, DialPoint
from glmtune.storage.files import json_text, write_atomically, write_error, write_text_atomically
from glmtune.tables import TextTable
from glmtune.version import __version__


def best_point(points: Sequence[DialPoint], target: float | None) -> DialPoint | None:
    """Return the point with the lowest loss among those that keep enough of the base's answers.

    Args:
        points: at least one.
        target: least share of answers kept; None: any.

    Returns:
        None where no point keeps so much.
    """
    allowed = [point for point in points if target is None or point.kept_frac >= target]
    return min(allowed, key=lambda point: point.loss_nats, default=None)


def dial_table(points: Sequence[DialPoint], title: str, *, name: str) -> TextTable:
    """Lay the points out, a row for every strength.

    Args:
        points: in the order of their rows.
        title: what was measured.
        name: of the strength: ``prefix_strength`` or ``adapter_scale``.
    """
    has_rouge = any(point.rouge_l is not None for point in points)
    columns = (name, "loss per token", *(["ROUGE-L"] if has_rouge else []))
    return TextTable(
        title,
        (*columns, "answers kept", "KL per token", "leaks"),
        tuple(
            (
                f"{point.strength:g}",
                f"{point.loss_nats:.4f}",
                *([f"{point.rouge_l:.2f}"] if point.rouge_l is not None else []),
                f"{100 * point.kept_frac:.1f} %",
                f"{point.kl_nats:.4f}",
                f"{100 * point.leak_frac:.1f} %",
            )
            for point in points
        ),
        caption="kept: general answers that are the base's, token by token; leaks: those in the task's style",
    )


def write_dial(folder: Path, points: Sequence[DialPoint], facts: Mapping[str, Any], *, name: str) -> None:
    """Write ``dial.json`` and ``dial.png``.

    Args:
        folder: of the points.
        points: by strength.
        facts: what they are of: plain values.
        name: see `dial_table`.

    Raises:
        GlmtuneError: a file cannot be written.
    """
    values = {**facts, "points": [asdict(point) for point in points], "glmtune_version": __version__}
    write_text_atomically(folder / RESULTS_FILE, json_text(values))
    draw_dial(points, folder / PICTURE_FILE, name=name)


def draw_dial(points: Sequence[DialPoint], path: Path, *, name: str) -> None:
    """Draw the task's loss against what is kept of the base, every point named by its strength.

    Args:
        points: by strength, which the line follows.
        path: the PNG to write.
        name: see `dial_table`.

    Raises:
        GlmtuneError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kept, losses = [100 * point.kept_frac for point in points], [point.loss_nats for point in points]
    axes.plot(kept, losses, "o-", color="#4477aa", markersize=5, linewidth=1)
    for point, x, y in zip(points, kept, losses, strict=True):
        axes.annotate(f"{point.strength:g}", (x, y), textcoords="offset points", xytext=(6, 5), fontsize=9)
    axes.set_xlim(-2, 104)
    axes.invert_yaxis()  # better is up, as more kept is right: the far corner is where one wants to be
    axes.set_xlabel("general answers kept as the base's, %")
    axes.set_ylabel("loss on the task's rows, nats per token (better is up)")
    axes.set_title(f"{name}: task against retention", fontsize=10)
    axes.grid(alpha=0.3)
    # No date and no version of matplotlib inside: the same points make the same bytes.
    options: dict[str, Any] = {"format": "png", "metadata": {"Software": "glmtune"}}
    try:
        write_atomically(path, lambda partial: figure.savefig(partial, **options))
    except OSError as error:
        raise write_error(path, error) from None
