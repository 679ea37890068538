"""A sweep for readers: its table, on the terminal and as Markdown, CSV and JSON, and what it means."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmtune.storage.files import json_text, write_text_atomically
from glmtune.sweep.metrics import Metric
from glmtune.sweep.picture import PICTURE_FILE, draw_sweep
from glmtune.sweep.space import Point, short_names
from glmtune.sweep.statistics import PointResult, Ranking
from glmtune.sweep.trials import TrialRecord, trial_name
from glmtune.tables import TextTable
from glmtune.version import __version__

RESULTS_FILE, TABLE_FILE, CSV_FILE, TRIALS_FILE = "sweep.json", "sweep.md", "sweep.csv", "trials.csv"
SHOWN_FAILURES = 5


def sweep_table(ranking: Ranking, metric: Metric, title: str) -> TextTable:
    """Lay the points out, the best one first.

    Args:
        ranking: at least one point.
        metric: what they are ordered by.
        title: above it.
    """
    keys = [key for key, _ in ranking.results[0].point.values]
    repeated = any(result.low is not None for result in ranking.results)
    failed = any(result.failed for result in ranking.results)
    columns = ["rank", *short_names(keys), metric.name]
    if repeated:
        columns += ["95 % interval", "seeds", "chance of best", "p", "verdict"]
    if failed:
        columns.append("failed")
    rows = []
    for place, result in enumerate(ranking.results):
        row = [str(place + 1), *(value for _, value in result.point.values)]
        row.append(_number(result.mean) if result.by_seed else "-")
        if repeated:
            row += _told(result, is_first=place == 0)
        if failed:
            row.append(str(len(result.failed)) if result.failed else "")
        rows.append(tuple(row))
    caption = _caption(metric, repeated=repeated)
    return TextTable(title, tuple(columns), tuple(rows), caption, text_columns=("verdict",))


def _told(result: PointResult, *, is_first: bool) -> list[str]:
    ends = (
        "-"
        if result.low is None or result.high is None
        else f"{_number(result.low)} to {_number(result.high)}"
    )
    chance = "-" if result.chance is None else f"{100 * result.chance:.0f} %"
    p_value = (
        "-" if result.p_value is None else "< 0.001" if result.p_value < 0.001 else f"{result.p_value:.3f}"
    )
    verdict = {None: "not told", True: "may be the best", False: "worse"}[result.may_be_best]
    if is_first and result.may_be_best:
        verdict = "best mean"
    return [ends, str(len(result.by_seed)), chance, p_value, verdict]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"


def _caption(metric: Metric, *, repeated: bool) -> str:
    way = "higher" if metric.is_larger_better else "lower"
    unit = f" ({metric.unit})" if metric.unit else ""
    text = f"{metric.name}{unit}, {way} is better"
    if not repeated:
        return f"{text}; one seed a point: the order of close ones may be luck"
    return (
        f"{text}; mean over seeds with its interval (Student); p: that a point so far behind is the best all"
        " the same (Welch, corrected for the number of points); below 0.05 it is worse"
    )


def verdict(ranking: Ranking, metric: Metric) -> list[str]:
    """Say in sentences what the table means.

    Args:
        ranking: see `sweep_table`.
        metric: what is best.

    Returns:
        Lines; the first names the best point.
    """
    best = ranking.best
    if best is None:
        return ["no point has a figure: every trial failed"]
    lines = [f"best: {best.point.shown} ({metric.name} {_number(best.mean)})"]
    if best.p_value is None:
        lines.append(
            "one seed a point: nothing tells whether it is better than the next or luckier."
            " `sweep.repeats=3` adds two seeds and keeps what is trained."
        )
        return lines
    assert best.chance is not None, "both come from several seeds"
    others = ranking.num_candidates - 1
    total = sum(result.p_value is not None for result in ranking.results)
    if others:
        lines.append(
            f"its chance to be truly the best is {100 * best.chance:.0f} %: {others} of {total - 1} others"
            " cannot be told apart from it. More seeds (`sweep.repeats`) tell more."
        )
    else:
        lines.append(
            f"its chance to be truly the best is {100 * best.chance:.0f} %, and all {total - 1} others are"
            " significantly worse."
        )
    if ranking.left_out is not None:
        lines.append(
            f"expect {_number(ranking.left_out)} of a new seed: the best by the other seeds scored so on the"
            " seed left out"
        )
    return lines


def failures(results: Sequence[PointResult]) -> list[str]:
    """List failed trials with their reasons, the first few."""
    found = [
        f"! {trial_name(result.point, seed)}: {reason}"
        for result in results
        for seed, reason in result.failed.items()
    ]
    more = len(found) - SHOWN_FAILURES
    return [*found[:SHOWN_FAILURES], *([f"! and {more} more"] if more > 0 else [])]


def write_sweep(
    folder: Path,
    ranking: Ranking,
    metric: Metric,
    records: Mapping[str, TrialRecord],
    *,
    title: str,
    commands: Mapping[str, str],
) -> list[Path]:
    """Write table, figures and picture.

    Args:
        folder: of the sweep.
        ranking: all points.
        metric: what they are ordered by.
        records: of the trials, by name.
        title: of the table.
        commands: what to type next, by what for.

    Returns:
        The files, the most useful first.

    Raises:
        GlmtuneError: one cannot be written.
    """
    table = sweep_table(ranking, metric, title)
    lines = [*verdict(ranking, metric), *failures(ranking.results)]
    shown = "\n".join(f"- {name}: `{command}`" for name, command in commands.items())
    body = "\n".join(f"{line}  " for line in lines)
    texts = {
        TABLE_FILE: f"{table.to_markdown()}\n{body}\n\n{shown}\n\n![{metric.name}]({PICTURE_FILE})\n",
        CSV_FILE: _csv(_point_rows(ranking, metric)),
        TRIALS_FILE: _csv(_trial_rows(ranking, records)),
        RESULTS_FILE: json_text(_values(ranking, metric, commands)),
    }
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    draw_sweep(ranking, metric, folder / PICTURE_FILE)
    return [folder / name for name in (TABLE_FILE, PICTURE_FILE, CSV_FILE, TRIALS_FILE, RESULTS_FILE)]


def _values(ranking: Ranking, metric: Metric, commands: Mapping[str, str]) -> dict[str, Any]:
    best = ranking.best
    return {
        "metric": metric.name,
        "is_larger_better": metric.is_larger_better,
        "best": None if best is None else _plain(best.point),
        "num_candidates": ranking.num_candidates,
        "left_out": ranking.left_out,
        "points": _point_rows(ranking, metric, nested=True),
        "commands": dict(commands),
        "glmtune_version": __version__,
    }


def _plain(point: Point) -> dict[str, str]:
    # Without Hydra's marks for keys that are added or taken away.
    return {key.lstrip("+~"): value for key, value in point.values}


def _point_rows(ranking: Ranking, metric: Metric, *, nested: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for result in ranking.results:
        values = _plain(result.point)
        by_seed = {str(seed): value for seed, value in result.by_seed.items()}
        rows.append(
            {
                **({"point": values} if nested else values),
                metric.name: result.mean if result.by_seed else None,
                "low": result.low,
                "high": result.high,
                "num_seeds": len(result.by_seed),
                "num_failed": len(result.failed),
                "chance_of_best": result.chance,
                "p_value": result.p_value,
                "may_be_best": result.may_be_best,
                **(
                    {"by_seed": by_seed, "failed": {str(k): v for k, v in result.failed.items()}}
                    if nested
                    else {}
                ),
            }
        )
    return rows


def _trial_rows(ranking: Ranking, records: Mapping[str, TrialRecord]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for result in ranking.results:
        for seed in sorted({*result.by_seed, *result.failed}):
            name = trial_name(result.point, seed)
            record = records.get(name)
            facts: dict[str, Any] = {"state": "failed" if seed in result.failed else "done"}
            if record is not None:
                facts |= {"seconds": record.seconds, "exit_code": record.exit_code, **record.figures}
            rows.append({"trial": name, **_plain(result.point), "seed": seed, **facts})
    return rows


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows with the columns of all of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
