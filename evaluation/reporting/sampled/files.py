"""What a sampled run leaves in its folder, and what a terminal shows of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metrics import Score, interval
from evaluation.reporting.chart import error_bars
from evaluation.reporting.clusters import cluster_table
from evaluation.reporting.figures import readable, save_figure
from evaluation.reporting.files import ANSWERS_CHECKSUM
from evaluation.reporting.sampled.result import FIRST, MAJORITY, MEAN, SampledResult, sampled_json
from evaluation.reporting.tables import measure_name, percent, run_table, subject_table, undecided_note
from evaluation.running.run_files import (
    ANSWERS_NAME,
    CHART_NAME,
    LATEX_NAME,
    REPORT_NAME,
    RESULTS_NAME,
    holds_evaluations,
)
from evaluation.statistics.sampled import Draws
from glmtune.storage.checksums import file_checksum, json_with_checksum, with_checksum
from glmtune.storage.files import json_text, write_text_atomically
from glmtune.storage.journal import refuse_foreign_folder
from glmtune.tables import TextTable, latex_document

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

ABOUT = {MEAN: "mean over answers (pass@1)", MAJORITY: "majority vote"}
ABOUT_GRADES = {**ABOUT, MEAN: "mean over answers"}


def estimates_table(result: SampledResult) -> TextTable:
    """Lay out mean, vote and pass@k under the average that the benchmark publishes.

    Args:
        result: of the run.
    """
    headline = result.summary.headline
    about = ABOUT_GRADES if result.is_graded else ABOUT
    rows: list[tuple[str, ...]] = []
    for name, summary in result.estimates.items():
        score = summary.micro if headline == "accuracy_micro" else summary.macro
        low, high = interval(score)
        rows.append(
            (
                about.get(name, name),
                f"{score.num_samples:,}",
                f"{result.num_answers}",
                percent(score.accuracy),
                percent(score.stderr),
                f"{100 * low:.2f}–{100 * high:.2f}",
            )
        )
    columns = ("", "n questions", "answers each", measure_name(result), "± s.e.", "95 % interval")
    notes = [
        f"{headline.removeprefix('accuracy_').capitalize()} average; the question is the unit of every error"
        " (Miller 2024, eq. 1; Wilson's interval at that error); pass@k is Chen et al. 2021, eq. 1"
    ]
    if result.is_graded:
        notes.append("answers are graded: an answer passes with full marks only")
    if result.drawing_frac is not None:
        notes.append(
            f"{100 * result.drawing_frac:.0f} % of the variance of the mean comes from the drawing, which"
            " more answers to each question would lower; the rest only more questions"
        )
    num_all = result.num_answers * len(result.draws)
    notes.append(
        f"{result.num_unparsed_answers:,} of {num_all:,} answers not understood,"
        f" {result.num_truncated_answers:,} truncated"
    )
    if result.num_undecided:
        notes.append(undecided_note(result.num_undecided, num_all))
    if result.failed:
        notes.append(result.failure_note)
    return TextTable(result.title, columns, tuple(rows), ". ".join(notes) + ".")


def sampled_tables(result: SampledResult) -> list[TextTable]:
    """Return the tables of the report.

    Args:
        result: of the run.
    """
    found = [estimates_table(result)]
    if (clustered := cluster_table(result.cluster_rows, measure_name(result))) is not None:
        found.append(clustered)
    return [*found, subject_table(result)] if len(result.summary.subjects) > 1 else found


def write_sampled_report(result: SampledResult, folder: Path, *, paper: bool = False) -> list[Path]:
    """Write results, answers, tables and the curve of pass@k.

    Args:
        result: of a run.
        folder: made if it is not there.
        paper: also write tables as LaTeX and the figure as SVG and PDF.

    Returns:
        The files, the most useful first.

    Raises:
        ConfigError: the folder holds something else.
        GlmtuneError: a file cannot be written; the answers are kept.
    """
    refuse_foreign_folder(folder, holds_evaluations, result="evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    tables = [*sampled_tables(result), run_table(result)]
    texts = {
        REPORT_NAME: "\n".join([f"# {result.title}", "", *(table.to_markdown() for table in tables)]),
        ANSWERS_NAME: "".join(_answer_lines(result)),
    }
    if paper:
        texts[LATEX_NAME] = latex_document(sampled_tables(result))
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    figures = draw_estimates(result, folder / CHART_NAME, paper=paper)
    values = {**sampled_json(result), ANSWERS_CHECKSUM: file_checksum(folder / ANSWERS_NAME)}
    write_text_atomically(folder / RESULTS_NAME, json_text(json_with_checksum(values)))
    return [folder / RESULTS_NAME, folder / REPORT_NAME, *figures, folder / ANSWERS_NAME]


def show_sampled(result: SampledResult, console: Console) -> None:
    """Print the estimates and the errors from clusters.

    Args:
        result: of a run.
        console: where to.
    """
    for table in sampled_tables(result)[:2]:
        if table.title != "Subjects":
            table.show(console)


def _answer_lines(result: SampledResult) -> list[str]:
    """Return every question with its answers as JSON lines, in the order of the data."""
    lines: list[str] = []
    for judgement, draws in zip(result.judgements, result.draws, strict=True):
        sample, voted = judgement.sample, draws.voted
        values: dict[str, Any] = {
            "subject": sample.subject,
            "index": sample.index,
            "prompt_hash": judgement.answer.prompt_hash,
            "num_fewshot": judgement.answer.num_fewshot,
            "extracted": {result.rule: voted},
            "answers": list(draws.answers),
            "scores": list(draws.scores),
            "gold": sample.answer,
            "status": _status(result, draws),
            "score": draws.mean,
        }
        if sample.cluster:
            values["cluster"] = sample.cluster
        lines.append(with_checksum(values))
    return lines


def _status(result: SampledResult, draws: Draws) -> str:
    """Return how the vote went, in the words of single answers."""
    if draws.voted is None:
        return "unparsed"
    if result.is_graded:
        return "graded"
    # Equal answers are judged alike, so any one of the voted says how the vote went.
    return "correct" if draws.scores[draws.answers.index(draws.voted)] == 1 else "wrong"


def draw_estimates(result: SampledResult, path: Path, *, paper: bool = False) -> list[Path]:
    """Write a figure: pass@k over k with its intervals, the majority vote beside it.

    Args:
        result: of a run.
        path: the file.
        paper: also as SVG and PDF.

    Returns:
        The files.

    Raises:
        GlmtuneError: one cannot be written.
    """
    from matplotlib.figure import Figure

    headline = result.summary.headline
    scores = {
        name: summary.micro if headline == "accuracy_micro" else summary.macro
        for name, summary in result.estimates.items()
    }
    passes: dict[int, Score] = {1: scores.get(FIRST, scores[MEAN])}
    passes |= {int(name[5:]): score for name, score in scores.items() if name.startswith("pass@")}
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    style: dict[str, Any] = {"capsize": 3, "markersize": 4, "linewidth": 1.2}
    axes.errorbar(
        list(passes),
        [100 * score.accuracy for score in passes.values()],
        yerr=error_bars(list(passes.values())),
        fmt="o-",
        color="#4477aa",
        label="pass@k",
        **style,
    )
    vote = scores[MAJORITY]
    axes.errorbar(
        [result.num_answers],
        [100 * vote.accuracy],
        yerr=error_bars([vote]),
        fmt="s",
        color="#ee6677",
        label="majority vote",
        **style,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(passes), [str(k) for k in passes])
    axes.set_ylim(0, 100)
    axes.set_xlabel("k answers")
    axes.set_ylabel(f"{measure_name(result)} (95 % interval)")
    axes.legend(fontsize=8)
    axes.set_title(readable(result.title), fontsize=10, wrap=True)
    return save_figure(figure, path, paper=paper)
