"""Everything a finished run leaves in its folder, and what a terminal shows of it.

The same answers give the same bytes: runs are compared by their files (``cmp``, checksums, version control),
so nothing in them may depend on the clock, on the order in which answers came, or on how often a run was
stopped. What took how long stands in ``timing.json`` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from evaluation.reporting.chart import draw_chart
from evaluation.reporting.clusters import cluster_table
from evaluation.reporting.mistakes import mistakes_page
from evaluation.reporting.published import PublishedRow, published_row
from evaluation.reporting.results import Result, results_json
from evaluation.reporting.submission import submission
from evaluation.reporting.tables import average_table, measure_name, rules_table, run_table, subject_table
from evaluation.running.run_files import (
    ANSWERS_NAME,
    CHART_NAME,
    LATEX_NAME,
    MISTAKES_NAME,
    REPORT_NAME,
    RESULTS_NAME,
    SUBMISSION_NAME,
    TIMING_NAME,
    is_evaluation,
)
from evaluation.running.runner import Finished
from glmtune.errors import DataError
from glmtune.storage.checksums import checked_json, file_checksum, json_with_checksum, with_checksum
from glmtune.storage.files import json_text, write_text_atomically
from glmtune.storage.journal import refuse_foreign_folder
from glmtune.storage.records import Count, Record, Text, validated
from glmtune.tables import TextTable, latex_document

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

AGAIN = "Run the same `glmtune eval` again (answers that exist are not asked again)."
ANSWERS_CHECKSUM = "answers_checksum"
"""Key of ``results.json``: the checksum of the answers that its figures were counted from."""


def write_report(result: Result, folder: Path, *, paper: bool = False) -> list[Path]:
    """Write results, answers, tables, chart, page of mistakes and (for C-Eval's test split) the submission.

    Args:
        result: of a run.
        folder: made if it is not there.
        paper: also write tables as LaTeX and the chart as SVG and PDF.

    Returns:
        The files, the most useful first.

    Raises:
        ConfigError: the folder holds something else.
        GlmtuneError: a file cannot be written; the answers are kept.
    """
    refuse_foreign_folder(folder, is_evaluation, result="evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        REPORT_NAME: _report(result),
        MISTAKES_NAME: mistakes_page(result),
        ANSWERS_NAME: "".join(_answer_lines(result)),
    }
    is_whole = not (result.task.is_partial or result.task.own_subjects)
    if paper:
        texts[LATEX_NAME] = latex_document(tables(result))
    if not result.task.labelled and result.task.benchmark == "ceval" and is_whole:
        texts[SUBMISSION_NAME] = json_text(submission(result))
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    names = [RESULTS_NAME, *texts]
    if result.task.labelled:
        names[2:2] = [path.name for path in draw_chart(result, folder / CHART_NAME, paper=paper)]
    # Last: a folder with results is finished, and they name the answers they were counted from.
    values = {**results_json(result), ANSWERS_CHECKSUM: file_checksum(folder / ANSWERS_NAME)}
    write_text_atomically(folder / RESULTS_NAME, json_text(json_with_checksum(values)))
    return [folder / name for name in names]


def _report(result: Result) -> str:
    parts = [*tables(result), run_table(result)]
    return "\n".join([f"# {result.title}", "", *(table.to_markdown() for table in parts)])


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
    clustered = cluster_table(result.cluster_rows, measure_name(result)) if result.task.labelled else None
    if clustered is not None:
        found.append(clustered)
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
    for table in tables(result)[:3]:
        if table.title != "Subjects":
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
        values = judgement.answer.to_values(with_timing=False)
        values["extracted"] = dict(judgement.extracted)
        if result.task.labelled:
            values |= {"gold": judgement.sample.answer, "status": judgement.status(result.rule)}
            if result.is_graded:
                values["score"] = judgement.scores.get(result.rule, 0.0)
            if result.rule in judgement.undecided:
                values["undecided"] = True
        if judgement.sample.cluster:
            values["cluster"] = judgement.sample.cluster
        lines.append(with_checksum(values))
    return lines


class _Model(Record):
    """The identity of a model, as far as it is read back."""

    name: Text
    dtype: Text
    quantization: Text
    adapter: Text
    engine: Text
    is_chat: bool
    weights_hash: Text


_Plain = bool | int | float | str | None


class _Fingerprint(Record):
    """What a comparison reads of a fingerprint."""

    benchmark: Text
    split: Text
    data_hash: Text
    protocol_version: Text
    model: _Model
    decoding: dict[str, _Plain | list[_Plain]]


class _Results(Record):
    """What is read back of a result; everything else in it is for people."""

    fingerprint: _Fingerprint
    title: Text
    benchmark: Text
    split: Text
    rule: Text
    num_samples: Annotated[Count, Field(ge=1, description="a whole number from 1")]
    num_unparsed: Count
    num_truncated: Count
    accuracy_micro: Annotated[float | None, Field(ge=0, le=1, description="a fraction of 1, or null")]
    is_sample_set: Annotated[bool, Field(description="true or false")]
    is_partial: Annotated[bool, Field(description="true or false")]
    answers_checksum: Text = ""


def read_results(path: Path) -> dict[str, Any]:
    """Read a ``results.json``.

    Args:
        path: the file.

    Raises:
        DataError: it is absent, damaged, or no result, with the key.
    """
    try:
        values = checked_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"it cannot be read as a result ({error}). Run `glmtune eval` first.", path=path
        ) from None
    try:
        validated(_Results, values)
    except ValueError as error:
        raise DataError(f"it is no result of `glmtune eval`: {error}. {AGAIN}", path=path) from None
    return values
