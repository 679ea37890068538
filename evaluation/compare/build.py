"""From runs to a report: two sides matched benchmark by benchmark, compared, and written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.compare.pairing.match import labels, match
from evaluation.compare.pairing.questions import find_questions, groups_of
from evaluation.compare.pairing.runs import Run
from evaluation.compare.reporting.report import compare_pair, show_comparison, write_comparison_files
from evaluation.compare.reporting.tables import ComparisonReport
from evaluation.compare.settings import GateSettings
from evaluation.compare.statistics.perplexity import TextLoss, compare_losses
from evaluation.sample import WindowLoss
from glmtune.errors import DataError
from glmtune.storage.names import last_part

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

DEFAULT_FOLDER = Path("runs") / "compare"


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        runs: benchmark to its finished run.
        weight_bytes: memory of the model's weights; None where no model was loaded.
        losses: of the windows of the text, if one was given.
    """

    runs: Mapping[str, Run]
    weight_bytes: int | None = None
    losses: Sequence[WindowLoss] = field(default_factory=tuple)


def build_report(
    baseline: Side, candidate: Side, gate: GateSettings, *, text_file: str | None = None
) -> ComparisonReport:
    """Compare two sides on all their benchmarks.

    Args:
        baseline: the side a drop is counted from.
        candidate: the side that is judged.
        gate: tolerance, confidence and draws.
        text_file: the text that the losses are of.

    Raises:
        DataError: they ran other benchmarks, or a pair of runs cannot be compared.
    """
    alone = sorted(baseline.runs.keys() ^ candidate.runs.keys())
    if alone:
        folders = [next(iter(side.runs.values())).folder for side in (baseline, candidate)]
        raise DataError(
            f"{', '.join(alone)} was run on one side only ({folders[0]} and {folders[1]}). Evaluate the other"
            " side on it too, or name the folders of single benchmarks."
        )
    groups = {name: groups_of(run) for name, run in baseline.runs.items()}
    pairs = {name: match(run, candidate.runs[name]) for name, run in baseline.runs.items()}
    first = next(iter(pairs.values()))
    loss: TextLoss | None = None
    if text_file is not None:
        loss = compare_losses(text_file, baseline.losses, candidate.losses, gate)
    return ComparisonReport(
        labels=labels(first.baseline, first.candidate),
        benchmarks={name: compare_pair(pair, groups[name], gate) for name, pair in pairs.items()},
        text_loss=loss,
    )


def default_comparison_folder(baseline: Side, candidates: Sequence[Side]) -> Path:
    """Return where a comparison goes if no folder is named; the same one always goes to the same place.

    Args:
        baseline: one side.
        candidates: the other; several for a table of methods.
    """
    # Fingerprints name questions, prompts and weights, so another model or protocol goes to another folder.
    prints = [[run.fingerprint for run in side.runs.values()] for side in (baseline, *candidates)]
    digest = hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:8]
    model = last_part(str(next(iter(baseline.runs.values())).model["name"]))
    words = ("+".join(baseline.runs), model, digest)
    return DEFAULT_FOLDER / "-".join(re.sub(r"[^\w.+-]+", "_", word) for word in words)


def deliver(
    report: ComparisonReport,
    gate: GateSettings,
    folder: Path,
    console: Console,
    *,
    data_dir: str | None,
    paper: bool = False,
) -> None:
    """Show a comparison and write its files.

    Args:
        report: the comparison.
        gate: tolerance and confidence.
        folder: where to.
        console: shows tables.
        data_dir: where the texts of the questions are looked for.
        paper: also write tables as LaTeX and figures as SVG and PDF.

    Raises:
        GlmtuneError: a file cannot be written.
    """
    show_comparison(report, gate, console)
    questions = {
        name: find_questions(each.pair.baseline, data_dir) for name, each in report.benchmarks.items()
    }
    written = write_comparison_files(report, gate, questions, folder, paper=paper)
    names = ", ".join(path.name for path in written)
    console.print(f"Written: {folder} ({names})", markup=False, highlight=False, soft_wrap=True)
