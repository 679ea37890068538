"""Every checkpoint of a training run, evaluated alike: `glmtune eval checkpoints=RUN`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.compare.reporting.curve import CONFIDENCE, Curve, Point, show_curves, write_curves
from evaluation.compare.statistics.pairwise import Difference, corrected, difference_of
from evaluation.evaluate import DEFAULT_FOLDER
from evaluation.metrics import Groups, Outcome, Score, summarize_outcomes
from evaluation.reporting.results import Evaluated
from evaluation.reporting.tables import measure_name
from glmtune.errors import ConfigError
from glmtune.storage.lock import lock_folder
from glmtune.tuned_files import ADAPTER_CONFIG, MODEL_CONFIG, PREFIX_FILE

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SETTINGS = {PREFIX_FILE: "prefix_path", ADAPTER_CONFIG: "adapter_path", MODEL_CONFIG: "source"}
"""A file that tells what a checkpoint holds: the setting that loads it, ``source`` being the model's."""


@dataclass(frozen=True, slots=True)
class Step:
    """A checkpoint, or the base that it began with.

    Attributes:
        number: of the step; 0 is the base.
        tuned: the setting that loads it with its value; empty for the base.
    """

    number: int
    tuned: Mapping[str, str] = field(default_factory=dict)


def find_steps(run: Path) -> list[Step]:
    """Find the checkpoints of a training run, the base before them.

    Args:
        run: its folder.

    Raises:
        ConfigError: there are none, or their files are of nothing that can be loaded.
    """
    folders = sorted(
        (int(found[1]), path)
        for path in (run.iterdir() if run.is_dir() else ())
        if path.is_dir() and (found := _CHECKPOINT.fullmatch(path.name))
    )
    if not folders:
        raise ConfigError(
            f"`checkpoints` is `{run}`, but there is no folder checkpoint-N in it"
            f"{'' if run.is_dir() else ' (it does not exist)'}. Give a run folder of `glmtune train`, which"
            " keeps as many as `trainer.save_total_limit` says."
        )
    steps = [Step(0)]
    for number, path in folders:
        name = next((name for name in SETTINGS if (path / name).is_file()), None)
        if name is None:
            raise ConfigError(
                f"`checkpoints` is `{run}`, but {path.name} holds neither a prefix, an adapter nor a model"
                f" ({', '.join(SETTINGS)}). Move it away."
            )
        steps.append(Step(number, {SETTINGS[name]: str(path)}))
    return steps


def report_steps(
    run: Path,
    done: Mapping[int, Sequence[Evaluated]],
    console: Console,
    *,
    output_dir: Path | None = None,
    paper: bool = False,
) -> Path:
    """Put the evaluations of all steps into curves, show and write them.

    Args:
        run: the training run.
        done: by step, in their order; the same benchmarks in the same order.
        console: shows the tables.
        output_dir: of the curves; None takes a folder that is the same for the same run and benchmarks.
        paper: also tables as LaTeX and the figure as SVG and PDF.

    Returns:
        Their folder.

    Raises:
        GlmtuneError: a file cannot be written.
    """
    first = next(iter(done.values()))
    names = [each.result.task.benchmark for each in first]
    curves = {
        name: make_curve({step: several[place] for step, several in done.items()})
        for place, name in enumerate(names)
    }
    folder = output_dir or steps_folder(run, names)
    with lock_folder(folder):
        written = write_curves(str(run), curves, folder, paper=paper)
    show_curves(curves, console)
    shown = ", ".join(path.name for path in written)
    console.print(f"Written: {folder} ({shown})", markup=False, highlight=False, soft_wrap=True)
    return folder


def make_curve(done: Mapping[int, Evaluated]) -> Curve:
    """Compare every step with the first, on the questions that all have answered.

    Args:
        done: by step, in their order.
    """
    results = [each.result for each in done.values()]
    task = results[0].task
    by_step = {
        step: {(row.subject, row.index): row for row in each.result.outcomes} for step, each in done.items()
    }
    first = next(iter(by_step.values()))
    averaged = set(task.groups.averaged(dict.fromkeys(subject for subject, _ in first)))
    keys = [key for key in first if key[0] in averaged and all(key in rows for rows in by_step.values())]
    outcomes = {step: [rows[key] for key in keys] for step, rows in by_step.items()}
    steps = list(done)
    changes = corrected(
        [
            difference_of(outcomes[step], outcomes[steps[0]], task.headline, confidence=CONFIDENCE)
            for step in steps[1:]
        ]
    )
    found: list[Difference | None] = [None, *changes]
    points = tuple(
        Point(step, _score(outcomes[step], task.headline), change, str(done[step].folder))
        for step, change in zip(steps, found, strict=True)
    )
    # The first that lacks questions, if one does: the title says PARTIAL of all then.
    titled = max(results, key=lambda result: result.task.is_partial)
    return Curve(titled.what, task.headline, points, measure_name(titled))


def _score(outcomes: Sequence[Outcome], average: str) -> Score:
    summary = summarize_outcomes(outcomes, Groups(headline=average))
    return summary.micro if average == "accuracy_micro" else summary.macro


def steps_folder(run: Path, names: Sequence[str]) -> Path:
    """Return where curves go if no folder is named; those of one run and the same benchmarks go to one place.

    Args:
        run: the training run.
        names: of the benchmarks.
    """
    digest = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
    word = re.sub(r"[^\w.+-]+", "_", f"{'+'.join(names)}-checkpoints-{run.resolve().name}")
    return DEFAULT_FOLDER / f"{word[:96]}-{digest}"
