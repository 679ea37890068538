"""Everything a finished run leaves in its folder, and what a terminal shows of it.

The same answers give the same bytes: runs are compared by their files (``cmp``, checksums, version control),
so nothing in them may depend on the clock, on the order in which answers came, or on how often a run was
stopped. What took how long stands in ``timing.json`` alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.reporting.chart import draw_chart
from evaluation.reporting.mistakes import mistakes_page
from evaluation.reporting.published import PublishedRow, published_row
from evaluation.reporting.results import Result, results_json
from evaluation.reporting.submission import submission
from evaluation.reporting.tables import average_table, rules_table, subject_table
from evaluation.running.runner import Finished
from glmtune.errors import DataError
from glmtune.files import json_text, write_text_atomically
from glmtune.tables import TextTable

if TYPE_CHECKING:
    from rich.console import Console

RESULTS_NAME = "results.json"
TIMING_NAME = "timing.json"
ANSWERS_NAME = "answers.jsonl"
REPORT_NAME = "report.md"
CHART_NAME = "chart.png"
MISTAKES_NAME = "mistakes.html"
SUBMISSION_NAME = "submission.json"


def write_report(result: Result, folder: Path) -> list[Path]:
    """Write results, answers, tables, chart, page of mistakes and (for C-Eval's test split) the submission.

    Args:
        result: of a run.
        folder: made if it is not there.

    Returns:
        The files, the most useful first.

    Raises:
        GlmtuneError: a file cannot be written; the answers are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        RESULTS_NAME: json_text(results_json(result)),
        REPORT_NAME: "\n".join([f"# {result.title}", "", *(table.to_markdown() for table in tables(result))]),
        MISTAKES_NAME: mistakes_page(result),
        ANSWERS_NAME: "".join(_answer_lines(result)),
    }
    if not result.task.labelled and result.task.benchmark == "ceval" and not result.task.is_partial:
        texts[SUBMISSION_NAME] = json_text(submission(result))
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    written = [folder / name for name in texts]
    if result.task.labelled:
        draw_chart(result, folder / CHART_NAME)
        written.insert(2, folder / CHART_NAME)
    return written


def write_timing(finished: Finished, folder: Path) -> None:
    """Write what depends on the clock, beside the results.

    Args:
        finished: the run.
        folder: of the run.
    """
    # Answers of earlier calls took their time then; only those of this call give a speed.
    num_new = len(finished.answers) - finished.num_resumed
    values = {
        "seconds": round(finished.seconds, 3),
        "num_answered": num_new,
        "num_resumed": finished.num_resumed,
        "answers_per_second": round(num_new / finished.seconds, 3) if finished.seconds else 0.0,
        "num_new_tokens": sum(answer.num_new_tokens for answer in finished.answers),
    }
    write_text_atomically(folder / TIMING_NAME, json_text(values))


def tables(result: Result) -> list[TextTable]:
    """Return the tables of a report: averages, rules, and subjects where there are several.

    Args:
        result: of a run.
    """
    found = [average_table(result, comparable_row(result)), rules_table(result)]
    return [*found, subject_table(result)] if len(result.summary.subjects) > 1 else found


def comparable_row(result: Result) -> PublishedRow | None:
    """Return the published figures that may stand beside a result, None where there are none.

    Args:
        result: of a run.
    """
    if not result.is_comparable:
        return None
    task = result.task
    return published_row(task.benchmark, task.split, result.fingerprint["model"])


def show(result: Result, console: Console) -> None:
    """Print the averages and rules.

    Args:
        result: of a run.
        console: where to.
    """
    for table in tables(result)[:2]:
        table.show(console)
    fingerprint = result.fingerprint
    weights = fingerprint["model"]["weights_hash"] or "unknown"
    console.print(
        f"data {fingerprint['data_hash'][:12]}, prompts {fingerprint['prompt_hash'][:12]}, "
        f"protocol {fingerprint['protocol_version']}, weights {weights}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _answer_lines(result: Result) -> list[str]:
    """Return every answer with its judgement as JSON lines, in the order of the data."""
    lines: list[str] = []
    for judgement in result.judgements:
        values: dict[str, Any] = json.loads(judgement.answer.to_line(with_timing=False))
        values["extracted"] = dict(judgement.extracted)
        if result.task.labelled:
            values |= {"gold": judgement.sample.answer, "status": judgement.status(result.rule)}
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    return lines


def read_results(path: Path) -> dict[str, Any]:
    """Read a ``results.json``.

    Args:
        path: the file.

    Raises:
        DataError: it is absent or no result.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"it cannot be read as a result ({error}). Run `glmtune eval` first.", path=path
        ) from None
    if not isinstance(values, dict) or "fingerprint" not in values:
        raise DataError("it is no result of `glmtune eval`: `fingerprint` is missing.", path=path)
    return values
