"""The table of a model card: one row per benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.reporting.files import comparable_row
from evaluation.reporting.results import Evaluated
from evaluation.reporting.tables import NOTHING, percent
from glmtune.storage.files import json_text, write_text_atomically
from glmtune.tables import TextTable

SUMMARY_NAME = "summary"
COLUMNS = (
    "benchmark", "protocol", "n", "average", "accuracy, %", "± s.e.", "unparsed", "published, %",
)  # fmt: skip


def summary_table(runs: Sequence[Evaluated], model: str) -> TextTable:
    """Lay out the results of several benchmarks as a model card does.

    Args:
        runs: finished evaluations.
        model: whose.
    """
    rows = [_row(run) for run in runs]
    marks = [mark for mark in ("OWN", "SAMPLE", "PARTIAL") if any(mark in run.result.title for run in runs)]
    title = " ".join([*marks, f"Model card: {model}"])
    return TextTable(title, COLUMNS, tuple(rows), text_columns=("protocol",))


def _row(run: Evaluated) -> tuple[str, ...]:
    result = run.result
    summary, task = result.summary, result.task
    published = comparable_row(result)
    return (
        f"{task.title} {task.split}",
        result.way_asked,
        f"{summary.micro.num_samples:,}",
        summary.headline.removeprefix("accuracy_"),
        percent(summary.accuracy) if task.labelled else NOTHING,
        percent(summary.stderr) if task.labelled else NOTHING,
        f"{summary.micro.num_unparsed:,}",
        NOTHING if published is None else f"{published.average:.2f}",
    )


def write_summary(runs: Sequence[Evaluated], model: str, folder: Path) -> list[Path]:
    """Write the table as Markdown, and the figures as JSON.

    Args:
        runs: finished evaluations.
        model: whose.
        folder: made if it is not there.

    Returns:
        Both files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        run.result.task.benchmark: {
            "title": run.result.title,
            "folder": str(run.folder),
            "accuracy": run.result.summary.accuracy if run.result.task.labelled else None,
            "average": run.result.summary.headline,
            "stderr": run.result.summary.stderr if run.result.task.labelled else None,
            "num_samples": run.result.summary.micro.num_samples,
            "num_failed": len(run.result.failed),
        }
        for run in runs
    }
    texts = {
        f"{SUMMARY_NAME}.md": summary_table(runs, model).to_markdown(),
        f"{SUMMARY_NAME}.json": json_text(values),
    }
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    return [folder / name for name in texts]
