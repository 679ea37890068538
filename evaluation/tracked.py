"""The figures of a result by name, as trackers of experiments take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.metrics import Score, interval
from evaluation.reporting.results import Evaluated, Result
from evaluation.reporting.sampled.result import SampledResult


def tracked_scores(result: Result) -> dict[str, float]:
    """Return the figures of a result under names that begin with its benchmark; fractions of 1.

    Args:
        result: of a run; where its split has no gold answers, only counts are there.

    Returns:
        ``gsm8k/accuracy`` with ``_stderr``, ``_low`` and ``_high`` of its 95 % interval, both averages, the
        categories, several answers' estimates, and counts.
    """
    name, summary = result.task.benchmark, result.summary
    found: dict[str, float] = {
        f"{name}/num_questions": summary.micro.num_samples,
        f"{name}/num_unparsed": summary.micro.num_unparsed,
        f"{name}/num_truncated": summary.micro.num_truncated,
        f"{name}/num_failed": len(result.failed),
    }
    if not result.task.labelled:
        return found
    headline = summary.micro if summary.headline == "accuracy_micro" else summary.macro
    scores: dict[str, Score] = {
        "accuracy": headline,
        "accuracy_micro": summary.micro,
        "accuracy_macro": summary.macro,
        **{f"category/{title}": score for title, score in summary.categories.items()},
    }
    if isinstance(result, SampledResult):
        scores |= {
            title: each.micro if each.headline == "accuracy_micro" else each.macro
            for title, each in result.estimates.items()
        }
    for title, score in scores.items():
        low, high = interval(score)
        found[f"{name}/{title}"] = score.accuracy
        if score.stderr is not None:
            found |= {
                f"{name}/{title}_stderr": score.stderr,
                f"{name}/{title}_low": low,
                f"{name}/{title}_high": high,
            }
    for row in result.cluster_rows:
        found[f"{name}/accuracy_stderr_by_{row.by}"] = row.found.stderr
    return found


def send_run(
    names: Sequence[str],
    settings: Mapping[str, Any],
    by_step: Mapping[int, Sequence[Evaluated]],
    folder: Path,
) -> None:
    """Send the figures of evaluations to trackers as one run, which has the name of their folder.

    Args:
        names: of trackers; none sends nothing.
        settings: all settings, nested, as files hold them.
        by_step: step of a training to its evaluations; 0 where there are no steps.
        folder: of the run.

    Raises:
        ConfigError: a tracker cannot start; what it was to be sent is written already.
    """
    from glmtune.tracking.scores import TrackedScores, send_scores
    from glmtune.tracking.services import run_name

    scores = [
        (step, {name: value for each in several for name, value in tracked_scores(each.result).items()})
        for step, several in by_step.items()
    ]
    send_scores(names, TrackedScores(run_name(folder), folder, settings, scores))
