"""What a run's benchmark knows and the run does not keep: the texts of its questions, how it averages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from evaluation.benchmarks.own.benchmark import reads_files_only
from evaluation.benchmarks.tasks import BENCHMARKS, make_task
from evaluation.compare.pairing.runs import Run
from evaluation.metrics import Groups
from evaluation.running.run_files import RESULTS_NAME
from evaluation.sample import Sample
from glmtune.errors import ConfigError, DataError, MissingExtraError, unknown_name
from glmtune.storage.records import Record, validated


def find_questions(run: Run, data_dir: str | None) -> Mapping[tuple[str, int], Sample]:
    """Find the texts of a run's questions; a run keeps their hash only.

    Args:
        run: a finished run.
        data_dir: where to look, see ``evaluation.settings.BenchmarkSettings``.

    Returns:
        Samples by subject and index; nothing where no data with that hash are found.
    """
    values = run.fingerprint
    subjects = list(dict.fromkeys(row.answer.subject for row in run.rows))
    own: object = run.results.get("own_benchmark")
    file = own.get("file") if isinstance(own, dict) else None
    try:
        if file is not None and not reads_files_only(Path(str(file))):
            return {}  # a run's folder may be anybody's: it sends nobody to the network
        task = make_task(
            str(file or values["benchmark"]),
            protocol=str(values["protocol_version"]).partition("/")[0],
            split=str(values["split"]),
            data_dir=None if file else data_dir,
            is_chat=bool(run.model["is_chat"]),
            subjects=subjects,
        )
    # Runs may be compared where their data, or what scores them, are not; the page says so.
    except (ConfigError, DataError, MissingExtraError):
        return {}
    asked = {row.answer.key for row in run.rows}
    task = dataclasses.replace(task, samples=tuple(each for each in task.samples if each.key in asked))
    if task.data_hash != values["data_hash"]:
        return {}
    return {each.key: each for each in task.samples}


class _OwnBenchmark(Record):
    """What a run keeps of a benchmark that does not ship."""

    headline: Annotated[Literal["accuracy_micro", "accuracy_macro"], Field(description="an average")]
    categories: Annotated[dict[str, str], Field(description="subject to category")]


def groups_of(run: Run) -> Groups:
    """Return how the subjects of a run are averaged: by the benchmark, or by what the run kept of one's own.

    Args:
        run: a finished run.

    Raises:
        DataError: it is no benchmark that ships, and the run has kept nothing.
    """
    name = str(run.results["benchmark"])
    if run.results.get("own_benchmark") is None and name in BENCHMARKS:
        return BENCHMARKS[name].groups(str(run.results["split"]))
    try:
        own = validated(_OwnBenchmark, run.results.get("own_benchmark") or {})
    except ValueError as error:
        raise DataError(
            f"{unknown_name('`benchmark`', name, BENCHMARKS)} ({error})", path=run.folder / RESULTS_NAME
        ) from None
    return Groups(headline=own.headline, categories=own.categories)
