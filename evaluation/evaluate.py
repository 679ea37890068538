"""One benchmark from questions to report: by a model, or from saved completions.

The folder of a run is found from its fingerprint, so that the same command finds its own answers again: to
resume, to report anew, or to be compared, without a name having been chosen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.backend import Backend, Drawing
from evaluation.reporting.files import show, write_report, write_timing
from evaluation.reporting.results import Evaluated, Result, make_result
from evaluation.reporting.sampled.files import show_sampled, write_sampled_report
from evaluation.reporting.sampled.result import put_together
from evaluation.running.data_parallel import Processes
from evaluation.running.environment import environment
from evaluation.running.fingerprint import deciding, fingerprint, of_all_answers
from evaluation.running.progress import progress_of
from evaluation.running.run_files import IDENTITY_NAME, ONE_ANSWER, holds_evaluations
from evaluation.running.runner import Finished, run_task
from evaluation.running.saved_answers import read_saved
from evaluation.settings import ALL
from evaluation.task import Task
from glmtune.errors import ConfigError
from glmtune.storage.journal import refuse_foreign_folder
from glmtune.storage.lock import lock_folder
from glmtune.storage.names import last_part

if TYPE_CHECKING:
    from glmtune.terminal.console import Console

DEFAULT_FOLDER = Path("runs") / "eval"
DIGITS = 8
"""Hexadecimal digits at the end of a folder's name."""
MAX_WORD = 48
"""Letters of each part of a folder's name, which may have 255 bytes: a server calls its model as it likes."""


def default_run_folder(values: Mapping[str, Any]) -> Path:
    """Return where a run goes if no folder is named; the same run always goes to the same place.

    Args:
        values: its fingerprint.

    Returns:
        A folder named after benchmark, split, protocol and model; eight digits tell all the rest apart.
    """
    protocol = str(values["protocol_version"]).partition("/")[0]
    return _named(values["benchmark"], values["split"], protocol, *_model_words(values), _digest([values]))


def _runs_beside(folder: Path) -> list[Path]:
    """Return default folders of runs whose names differ from that of another in their last digits alone."""
    name, _, _ = folder.name.rpartition("-")
    return sorted(path for path in folder.parent.glob(f"{name}-{'[0-9a-f]' * DIGITS}") if path != folder)


def default_summary_folder(runs: Sequence[Evaluated]) -> Path:
    """Return where the table of several benchmarks goes if no folder is named: it is of what answered them.

    Args:
        runs: of one model.
    """
    values = [run.fingerprint for run in runs]
    return _named(ALL, *_model_words(values[0]), _digest(values))


def _digest(several: Sequence[Mapping[str, Any]]) -> str:
    """Return eight digits of what decides the answers: the same weights by another name are the same run."""
    parts = [json.dumps(deciding(dict(values)), sort_keys=True) for values in several]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:DIGITS]


def _model_words(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the last part of the model's name, and the host of a server."""
    model = values["model"]
    name = last_part(str(model["name"]))
    server = model.get("server") or {}
    where = server.get("name") or str(server.get("url", "")).partition("://")[2].partition("/")[0]
    return (name, where) if where else (name,)


def _named(*words: object) -> Path:
    return DEFAULT_FOLDER / "-".join(re.sub(r"[^\w.-]+", "_", str(word))[:MAX_WORD] for word in words)


def evaluate_model(
    task: Task,
    backend: Backend,
    console: Console,
    *,
    output_dir: Path | None = None,
    resume: bool = True,
    processes: Processes | None = None,
    paper: bool = False,
) -> Evaluated | None:
    """Ask a model what is not answered yet, and report.

    Args:
        task: what to ask.
        backend: whom to ask.
        console: shows progress and tables, of the first process only.
        output_dir: of the run; None takes ``default_run_folder``.
        resume: go on with the answers there; otherwise they are moved aside.
        processes: this process among those that share the run.
        paper: also write tables as LaTeX and figures as SVG and PDF.

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
        _refuse_other_kind(folder, is_sampled=False)
        _announce(shown, task, folder, getattr(backend, "notes", ()))
    # A folder that was named is gone on in with more questions; of the others each has its own.
    beside = [] if output_dir else _runs_beside(folder)
    # Held by the first process, as it opens the run, and writes the report when all have answered.
    with lock_folder(folder) if not processes.rank else nullcontext():
        finished = _answer(task, backend, folder, shown, resume=resume, processes=processes, beside=beside)
        if finished is None:
            return None
        evaluated = _report(_result_of(task, finished, backend), folder, values, console, paper=paper)
        # After the report and beside it: what depends on the clock is in no other file.
        write_timing(finished, folder)
    return evaluated


def evaluate_sampled(
    task: Task,
    backend: Backend,
    console: Console,
    *,
    num_answers: int,
    drawing: Drawing,
    output_dir: Path | None = None,
    resume: bool = True,
    processes: Processes | None = None,
    paper: bool = False,
) -> Evaluated | None:
    """Ask a model every question several times, and report mean, majority vote and pass@k.

    Each answer to all questions is a run of its own, in a folder of the run's: it goes on after a kill, is
    shared among processes and reported like any other. More answers later are added to those there.

    Args:
        task: what to ask; the model must write its answers.
        backend: whom to ask.
        console: shows progress and tables, of the first process only.
        num_answers: to each question.
        drawing: how tokens are drawn; its number is set here.
        output_dir: of the run; None takes a folder that is the same for any number of answers.
        resume: go on with the answers there; otherwise they are moved aside.
        processes: this process among those that share the run.
        paper: also write tables as LaTeX and figures as SVG and PDF.

    Returns:
        What came out; None in processes other than the first.

    Raises:
        ConfigError: the protocol generates nothing, or the split has no gold answers.
        GlmtuneError: see ``evaluation.running.runner.run_task``.
    """
    if not task.labelled:
        raise ConfigError(
            f"`samples` is {num_answers}, but {task.title} {task.split} has no gold answers, so nothing tells"
            " how many of several are right. Leave `samples` out, or use a labelled split."
        )
    processes = processes or Processes()
    numbered = [task.drawn(dataclasses.replace(drawing, number=number)) for number in range(num_answers)]
    common = fingerprint(numbered[0], backend.identity, backend.max_context_tokens)
    values = of_all_answers(common, num_answers)
    folder = output_dir or default_run_folder(of_all_answers(common))
    shown = None if processes.rank else console
    if shown is not None:
        refuse_foreign_folder(folder, holds_evaluations, result="evaluation")
        _refuse_other_kind(folder, is_sampled=True)
        _announce(shown, task, folder, getattr(backend, "notes", ()))
    beside = [] if output_dir else _runs_beside(folder)
    results: list[Result] = []
    with lock_folder(folder) if not processes.rank else nullcontext():
        for number, each in enumerate(numbered, start=1):
            name = ONE_ANSWER.format(number)
            if shown is not None:
                shown.print(f"answer {number} of {num_answers}", highlight=False)
            finished = _answer(
                each, backend, folder / name, shown, resume=resume, processes=processes,
                beside=[path / name for path in beside],
            )  # fmt: skip
            if finished is not None:
                results.append(_result_of(each, finished, backend))
                write_report(results[-1], folder / name)
                write_timing(finished, folder / name)
        if not results:
            return None
        result = put_together(results, values)
        written = write_sampled_report(result, folder, paper=paper)
    show_sampled(result, console)
    _say_written(folder, written, console)
    return Evaluated(result, folder, values)


def _refuse_other_kind(folder: Path, *, is_sampled: bool) -> None:
    """Refuse to put a run of one answer into the folder of one of several answers, or the other way round."""
    there = folder / (IDENTITY_NAME if is_sampled else ONE_ANSWER.format(1))
    if there.exists():
        kinds = ("one answer", "several answers")
        raise ConfigError(
            f"`output_dir` is `{folder}`, but it holds a run of {kinds[not is_sampled]} to each question"
            f" ({there.name}), and this one is of {kinds[is_sampled]}. Give another folder."
        )


def _answer(
    task: Task,
    backend: Backend,
    folder: Path,
    shown: Console | None,
    *,
    resume: bool,
    processes: Processes,
    beside: Sequence[Path],
) -> Finished | None:
    """Ask what is not answered yet, and show how far it is."""
    with progress_of(task, shown) as progress:
        return run_task(
            task, backend, folder, resume=resume, processes=processes, progress=progress, beside=beside
        )


def _result_of(task: Task, finished: Finished, backend: Backend) -> Result:
    """Judge what is answered; questions that failed are left out, and the result is then partial."""
    num_asked = len(task.samples)
    if finished.failed:
        answered = {answer.key for answer in finished.answers}
        kept = tuple(sample for sample in task.samples if sample.key in answered)
        task = dataclasses.replace(task, samples=kept, is_partial=True)
    values = fingerprint(task, backend.identity, backend.max_context_tokens)
    result = make_result(task, finished.answers, values, _environment(backend))
    return dataclasses.replace(result, failed=finished.failed, num_asked=num_asked)


def _environment(backend: Backend) -> dict[str, Any]:
    """Describe how a backend was asked: its device and notes, where it has some."""
    found = environment(getattr(backend, "device", ""), clean=getattr(backend, "without_secrets", str))
    return {**found, "notes": " ".join(getattr(backend, "notes", ()))}


def evaluate_saved(
    task: Task,
    completions: Path,
    console: Console,
    *,
    output_dir: Path | None = None,
    allow_missing: bool = False,
    model: str | None = None,
    paper: bool = False,
) -> Evaluated:
    """Score saved completions and report; no model is loaded.

    Args:
        task: what was asked.
        completions: a JSONL file, or the folder of an earlier run.
        console: shows tables.
        output_dir: of the report; None takes ``default_run_folder``.
        allow_missing: score a part; its title says PARTIAL.
        model: whose completions they are; None names the file.
        paper: also write tables as LaTeX and figures as SVG and PDF.

    Raises:
        GlmtuneError: see ``evaluation.running.saved_answers.read_saved``.
    """
    saved = read_saved(completions, task, allow_missing=allow_missing, model=model)
    values = fingerprint(saved.task, saved.identity, None)
    folder = output_dir or default_run_folder(values)
    _announce(console, saved.task, folder)
    result = make_result(saved.task, saved.answers, values, environment())
    with lock_folder(folder):
        return _report(result, folder, values, console, paper=paper)


def _announce(console: Console, task: Task, folder: Path, notes: Sequence[str] = ()) -> None:
    questions = f"{len(task.samples):,} questions of {task.title} {task.split}"
    lines = (f"data   {task.source}: {questions} (licence: {task.licence})", f"output {folder}")
    for line in (*lines, *(f"note   {note}" for note in notes)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _report(
    result: Result, folder: Path, values: Mapping[str, Any], console: Console, *, paper: bool
) -> Evaluated:
    written = write_report(result, folder, paper=paper)
    show(result, console)
    _say_written(folder, written, console)
    return Evaluated(result, folder, values)


def _say_written(folder: Path, written: Sequence[Path], console: Console) -> None:
    names = ", ".join(path.name for path in written)
    console.print(f"Written: {folder} ({names})", markup=False, highlight=False, soft_wrap=True)
