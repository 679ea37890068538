"""One benchmark from questions to report: by a model, or from saved completions.

The folder of a run is found from its fingerprint, so that the same command finds its own answers again: to
resume, to report anew, or to be compared, without a name having been chosen.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.backend import Backend
from evaluation.reporting.files import show, write_report, write_timing
from evaluation.reporting.results import Evaluated, Result, make_result
from evaluation.running.data_parallel import Processes
from evaluation.running.fingerprint import deciding, fingerprint
from evaluation.running.progress import progress_of
from evaluation.running.runner import run_task
from evaluation.running.saved_answers import read_saved
from evaluation.task import Task

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_FOLDER = Path("runs") / "eval"


def default_run_folder(values: Mapping[str, Any]) -> Path:
    """Return where a run goes if no folder is named; the same run always goes to the same place.

    Args:
        values: its fingerprint.

    Returns:
        A folder named after benchmark, split, protocol and model; eight digits tell all the rest apart.
    """
    # Only what decides the answers: the same weights under another name are the same run.
    digest = hashlib.sha256(json.dumps(deciding(dict(values)), sort_keys=True).encode()).hexdigest()[:8]
    model = re.split(r"[/\\]", str(values["model"]["name"]).rstrip("/\\"))[-1]
    protocol = str(values["protocol_version"]).partition("/")[0]
    words = (values["benchmark"], values["split"], protocol, model, digest)
    return DEFAULT_FOLDER / "-".join(re.sub(r"[^\w.-]+", "_", str(word)) for word in words)


def evaluate_model(
    task: Task,
    backend: Backend,
    console: Console,
    *,
    output_dir: Path | None = None,
    resume: bool = True,
    processes: Processes | None = None,
) -> Evaluated | None:
    """Ask a model what is not answered yet, and report.

    Args:
        task: what to ask.
        backend: whom to ask.
        console: shows progress and tables, of the first process only.
        output_dir: of the run; None takes ``default_run_folder``.
        resume: go on with the answers there; otherwise they are moved aside.
        processes: this process among those that share the run.

    Returns:
        What came out; None in processes other than the first.

    Raises:
        GlmtuneError: see ``evaluation.running.runner.run_task``.
    """
    processes = processes or Processes()
    values = fingerprint(task, backend.identity, backend.max_context_tokens)
    folder = output_dir or default_run_folder(values)
    shown = None if processes.rank else console
    if shown is not None:
        _announce(shown, task, folder)
    with progress_of(task, shown) as progress:
        finished = run_task(task, backend, folder, resume=resume, processes=processes, progress=progress)
    if finished is None:
        return None
    result = make_result(task, finished.answers, values)
    evaluated = _report(result, folder, console)
    # After the report and beside it: what depends on the clock is in no other file.
    write_timing(finished, folder)
    return evaluated


def evaluate_saved(
    task: Task,
    completions: Path,
    console: Console,
    *,
    output_dir: Path | None = None,
    allow_missing: bool = False,
    model: str | None = None,
) -> Evaluated:
    """Score saved completions and report; no model is loaded.

    Args:
        task: what was asked.
        completions: a JSONL file, or the folder of an earlier run.
        console: shows tables.
        output_dir: of the report; None takes ``default_run_folder``.
        allow_missing: score a part; its title says PARTIAL.
        model: whose completions they are; None names the file.

    Raises:
        GlmtuneError: see ``evaluation.running.saved_answers.read_saved``.
    """
    saved = read_saved(completions, task, allow_missing=allow_missing, model=model)
    values = fingerprint(saved.task, saved.identity, None)
    folder = output_dir or default_run_folder(values)
    _announce(console, saved.task, folder)
    return _report(make_result(saved.task, saved.answers, values), folder, console)


def _announce(console: Console, task: Task, folder: Path) -> None:
    questions = f"{len(task.samples):,} questions of {task.title} {task.split}"
    lines = (f"data   {task.source}: {questions} (licence: {task.licence})", f"output {folder}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _report(result: Result, folder: Path, console: Console) -> Evaluated:
    written = write_report(result, folder)
    show(result, console)
    names = ", ".join(path.name for path in written)
    console.print(f"Written: {folder} ({names})", markup=False, highlight=False, soft_wrap=True)
    return Evaluated(result, folder)
