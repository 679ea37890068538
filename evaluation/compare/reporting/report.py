"""Everything a comparison leaves in its folder, and what a terminal shows of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.compare.pairing.match import Pair, differences
from evaluation.compare.pairing.runs import Run
from evaluation.compare.reporting.charts import draw_bars, draw_margins
from evaluation.compare.reporting.flips import Questions, flips_page
from evaluation.compare.reporting.further import clustered_drops, further_tables, over_benchmarks_json
from evaluation.compare.reporting.published import published_drops, why_pairs
from evaluation.compare.reporting.tables import (
    Compared,
    ComparisonReport,
    difference_table,
    flips_table,
    group_table,
    main_table,
    margin_table,
    sensitivity_tables,
    text_loss_table,
)
from evaluation.compare.settings import GateSettings
from evaluation.compare.statistics.drops import compare_outcomes
from evaluation.compare.statistics.gate import EXIT_CODES
from evaluation.compare.statistics.graded import compare_grades, has_grades
from evaluation.compare.statistics.sensitivity import measure
from evaluation.metrics import Groups
from evaluation.running.run_files import LATEX_NAME
from glmtune.storage.checksums import checked_json
from glmtune.storage.files import json_text, write_text_atomically
from glmtune.storage.journal import refuse_foreign_folder
from glmtune.tables import TextTable, latex_document

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

JSON_NAME = "compare.json"
MARKDOWN_NAME = "compare.md"
FLIPS_NAME = "flips.html"
BARS_NAME = "drops.png"
MARGINS_NAME = "flips_by_margin.png"
NO_Z = "undefined"


def is_comparison(folder: Path) -> bool:
    """Say whether a folder holds a comparison of ours, or those of several candidates."""
    return any(_is_ours(path) for path in (folder / JSON_NAME, *folder.glob(f"*/{JSON_NAME}")))


def _is_ours(path: Path) -> bool:
    try:
        values = checked_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(keys <= values.keys() for keys in ({"outcome", "gate", "benchmarks"}, {"runs", "benchmarks"}))


def compare_pair(pair: Pair, groups: Groups, gate: GateSettings) -> Compared:
    """Compare two runs of one benchmark in every way.

    Args:
        pair: both runs.
        groups: how the benchmark averages.
        gate: tolerance, confidence and draws.
    """
    outcomes = [[rows[side].outcome for rows in pair.rows] for side in (0, 1)]
    compare = compare_grades if has_grades(*outcomes) else compare_outcomes
    return Compared(pair, compare(outcomes[0], outcomes[1], groups, gate), measure(pair))


def write_comparison_files(
    report: ComparisonReport,
    gate: GateSettings,
    questions: Questions,
    folder: Path,
    *,
    paper: bool = False,
) -> list[Path]:
    """Write figures, tables, page of flips and charts into a folder that holds nothing else.

    Args:
        report: the comparison.
        gate: tolerance and confidence.
        questions: texts of the questions, as far as they are known.
        folder: made if it is not there.
        paper: also tables as LaTeX and figures as SVG and PDF.

    Returns:
        The files, the most useful first.

    Raises:
        ConfigError: the folder holds something else.
        GlmtuneError: a file cannot be written.
    """
    refuse_foreign_folder(folder, is_comparison, result="comparison")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        JSON_NAME: json_text(comparison_json(report, gate)),  # first: it marks the folder as ours
        MARKDOWN_NAME: markdown(report, gate),
        FLIPS_NAME: flips_page(report, questions),
    }
    if paper:
        texts[LATEX_NAME] = latex_document(shown_tables(report, gate))
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    written = [folder / name for name in (MARKDOWN_NAME, JSON_NAME, FLIPS_NAME)]
    written += [folder / LATEX_NAME] if paper else []
    written += draw_bars(report, gate.confidence, folder / BARS_NAME, paper=paper)
    if any(each.sensitivity.choices is not None for each in report.benchmarks.values()):
        written += draw_margins(report, folder / MARGINS_NAME, paper=paper)
    return written


def verdict_lines(report: ComparisonReport) -> list[str]:
    """Return the verdict of every benchmark as a sentence.

    Args:
        report: the comparison.
    """
    return [
        f"{each.pair.what} ({each.comparison.verdict.average}): {each.comparison.verdict.sentence()}"
        for each in report.benchmarks.values()
    ]


def markdown(report: ComparisonReport, gate: GateSettings) -> str:
    """Write the report.

    Args:
        report: the comparison.
        gate: tolerance and confidence.
    """
    # Verdicts first, then what they rest on, then what moved besides, and the long tables of subjects last.
    parts = [f"# {report.title}", "", *(f"- {line}" for line in verdict_lines(report)), ""]
    parts.append(main_table(report, gate.confidence).to_markdown())
    parts.append(flips_table(report).to_markdown())
    parts += [table.to_markdown() for table in further_tables(report, gate.confidence)]
    for name, each in report.benchmarks.items():
        if each.comparison.categories:
            title = f"Categories: {name}"
            parts.append(group_table(title, each.comparison.categories, "category").to_markdown())
    parts += [table.to_markdown() for table in sensitivity_tables(report)]
    margins = (margin_table(name, each) for name, each in report.benchmarks.items())
    parts += [table.to_markdown() for table in margins if table is not None]
    if report.text_loss is not None:
        parts.append(text_loss_table(report.text_loss, report.labels).to_markdown())
    parts.append(_difference(report).to_markdown())
    parts += ["## Why pairs", "", why_pairs(), "", _pairing_here(report), ""]
    for name, each in report.benchmarks.items():
        if len(each.comparison.subjects) > 1:
            parts.append(group_table(f"Subjects: {name}", each.comparison.subjects, "subject").to_markdown())
    return "\n".join(parts)


def _difference(report: ComparisonReport) -> TextTable:
    first = next(iter(report.benchmarks.values())).pair
    return difference_table(differences(first.baseline, first.candidate), report.labels)


def _pairing_here(report: ComparisonReport) -> str:
    parts: list[str] = []
    for name, each in report.benchmarks.items():
        found = each.comparison
        flipped = found.micro.num_lost + found.micro.num_gained
        share = 100 * flipped / found.micro.num_samples
        zs = [NO_Z if z is None else f"{z:.2f}" for z in (found.unpaired_z, found.paired_z)]
        parts.append(f"{name}: {share:.1f} % of the questions flipped, z = {zs[0]} unpaired, {zs[1]} paired")
    return f"Here: {'; '.join(parts)}."


def comparison_json(report: ComparisonReport, gate: GateSettings) -> dict[str, Any]:
    """Return the content of ``compare.json``: every figure, nothing that depends on the clock.

    Args:
        report: the comparison.
        gate: tolerance and confidence.
    """
    return {
        "title": report.title,
        "outcome": report.outcome,
        "exit_code": EXIT_CODES[report.outcome],
        "labels": list(report.labels),
        "gate": dataclasses.asdict(gate),
        "benchmarks": {name: _benchmark_json(each, gate) for name, each in report.benchmarks.items()},
        "over_benchmarks": over_benchmarks_json(report, gate.confidence),
        "perplexity": None if report.text_loss is None else dataclasses.asdict(report.text_loss),
        "published": [dataclasses.asdict(each) for each in published_drops()],
    }


def _benchmark_json(each: Compared, gate: GateSettings) -> dict[str, Any]:
    comparison = each.comparison
    clustered = clustered_drops(each, gate.confidence)
    return {
        "title": each.pair.title,
        "rule": each.pair.baseline.rule,
        "runs": {
            "baseline": _run_json(each.pair.baseline),
            "candidate": _run_json(each.pair.candidate),
        },
        "headline": comparison.headline,
        "verdict": {**dataclasses.asdict(comparison.verdict), "sentence": comparison.verdict.sentence()},
        **{name: dataclasses.asdict(getattr(comparison, name)) for name in ("micro", "macro")},
        "unpaired_z": comparison.unpaired_z,
        "paired_z": comparison.paired_z,
        "min_detectable_pp": comparison.min_detectable_pp,
        "categories": {name: dataclasses.asdict(drop) for name, drop in comparison.categories.items()},
        "subjects": {name: dataclasses.asdict(drop) for name, drop in comparison.subjects.items()},
        "clustered": {way: dataclasses.asdict(found) for way, found in clustered.items()},
        "sensitivity": dataclasses.asdict(each.sensitivity),
    }


def _run_json(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "title": run.results["title"],
        "num_unparsed": run.results["num_unparsed"],
        "num_truncated": run.results["num_truncated"],
        "fingerprint": dict(run.fingerprint),
    }


def shown_tables(report: ComparisonReport, gate: GateSettings) -> list[TextTable]:
    """Return the tables of the report that a terminal shows, and a paper may take.

    Args:
        report: the comparison.
        gate: tolerance and confidence.
    """
    tables = [
        main_table(report, gate.confidence),
        flips_table(report),
        *further_tables(report, gate.confidence),
        *sensitivity_tables(report),
    ]
    if report.text_loss is not None:
        tables.append(text_loss_table(report.text_loss, report.labels))
    return tables


def show_comparison(report: ComparisonReport, gate: GateSettings, console: Console) -> None:
    """Print the main tables and the verdicts.

    Args:
        report: the comparison.
        gate: tolerance and confidence.
        console: where to.
    """
    console.print(report.title, markup=False, highlight=False)
    for table in shown_tables(report, gate):
        table.show(console)
    for line in verdict_lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
