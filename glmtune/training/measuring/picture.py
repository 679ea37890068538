"""The picture of a run's bargain: what the task gained, and what was left of the base for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRIC_WORDS = {"loss": "evaluation loss (nats per answer token)", "accuracy": "accuracy (answer tokens)"}


def plot_retention(
    entries: Sequence[Mapping[str, Any]], path: Path, *, metric: str, target: float | None
) -> None:
    """Draw the task score against retention, step by step, and both retention and leaks over the steps.

    Nothing is drawn where nothing was measured. A run without rows to evaluate on has no task score, and so
    the second part alone.

    Args:
        entries: lines of ``trainer_log.jsonl``.
        path: the PNG to write.
        metric: the task score, ``loss`` or ``accuracy``.
        target: the share of answers that `best` must keep, if one is set.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [entry for entry in entries if "eval_retention" in entry]
    if not measured:
        return
    key = f"eval_{metric}"
    # The base itself, at step 0, keeps all its answers by definition and is not asked twice.
    base = [{**entry, "eval_retention": 1.0} for entry in entries if entry["step"] == 0 and key in entry]
    judged = [entry for entry in [*base[:1], *measured] if key in entry]
    figure = Figure(figsize=(11 if judged else 6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subplots(1, 2 if judged else 1, squeeze=False)[0]
    if judged:
        axes = parts[0]
        kept = [100 * entry["eval_retention"] for entry in judged]
        scores = [entry[key] for entry in judged]
        axes.plot(kept, scores, "o-", markersize=4)
        for entry, x, y in zip(judged, kept, scores, strict=True):
            name = f"step {entry['step']}" if entry["step"] else "base"
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set_xlabel("answers identical to the base's (%)")
        axes.set_ylabel(METRIC_WORDS[metric])
        axes.set_xlim(-4, 108)
        if target is not None:
            axes.axvline(100 * target, linestyle=":", color="gray")
            axes.annotate("target", (100 * target, max(scores)), fontsize=8, color="gray")
    axes = parts[-1]
    steps = [0, *(entry["step"] for entry in measured)]
    for name, label, first in (("eval_retention", "identical", 100.0), ("eval_leak_rate", "leaks", 0.0)):
        shares = [first, *(100 * entry[name] for entry in measured)]
        axes.plot(steps, shares, "o-", label=label, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("% of general prompts")
    axes.set_ylim(-4, 104)
    axes.legend()
    for axes in parts:
        axes.grid(alpha=0.3)
    figure.savefig(path)
