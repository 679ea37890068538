"""Several finished runs, of glmtune and of other tools, each against each: `glmtune compare runs=[A,B,C]`."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.compare.build import DEFAULT_FOLDER
from evaluation.compare.pairing.lm_eval import is_samples, read_samples
from evaluation.compare.pairing.opencompass import is_work_folder, read_work_folder
from evaluation.compare.pairing.runs import Run, find_runs
from evaluation.compare.pairing.scores import ScoredRun, aligned, average_of, mean_of, scored
from evaluation.compare.reporting.matrix import BenchmarkMatrix, Matrix, Shown
from evaluation.compare.settings import ImportSettings
from evaluation.compare.statistics.pairwise import Difference, Pooled, corrected, difference_of, pool
from evaluation.metrics import Groups, Outcome, Score, summarize_outcomes
from glmtune.errors import ConfigError, DataError

Sides = list[dict[str, ScoredRun]]
"""What each run holds: benchmark to its scores."""


def read_sides(names: Sequence[str], settings: ImportSettings, data_dir: str | None) -> Sides:
    """Read runs, whoever made them.

    Args:
        names: one for each side; several that `+` joins are averaged question by question. Folders of
            `glmtune eval`, folders or files with samples of lm-evaluation-harness, folders of OpenCompass.
        settings: which figures of other tools count.
        data_dir: where texts of questions are looked for, if a run of another tool is among them.

    Raises:
        ConfigError: there is no such run, or a setting of runs of other tools that are not there.
        DataError: a run cannot be read.
    """
    several = [_repeats(name) for name in names]
    paths = [path for each in several for path in each]
    single = _read(paths, settings, data_dir)
    sides: Sides = []
    for each in several:
        runs, single = single[: len(each)], single[len(each) :]
        sides.append(runs[0] if len(runs) == 1 else _joined(runs, each))
    return sides


def _repeats(name: str) -> list[Path]:
    """Return the folders that a side names: one, or several that `+` joins (seeds of one training)."""
    whole = Path(name).expanduser()
    parts = [Path(part).expanduser() for part in name.split("+")]
    return [whole] if len(parts) == 1 or whole.exists() else parts


def _joined(runs: Sides, paths: Sequence[Path]) -> dict[str, ScoredRun]:
    names = _common(runs, [str(path) for path in paths])
    return {name: mean_of([run[name] for run in runs]) for name in names}


def _read(paths: Sequence[Path], settings: ImportSettings, data_dir: str | None) -> Sides:
    own: dict[int, dict[str, Run]] = {}
    sides: dict[int, dict[str, ScoredRun]] = {}
    for place, path in enumerate(paths):
        if is_samples(path):
            sides[place] = read_samples(path, metric=settings.metric, filter=settings.filter)
        elif is_work_folder(path):
            sides[place] = read_work_folder(path)
        else:
            own[place] = find_runs(path)
    if settings != ImportSettings() and not any(is_samples(path) for path in paths):
        raise ConfigError(
            "`imported` is given, but none of `runs` holds samples of lm-evaluation-harness, so it would be"
            " ignored. Leave it out."
        )
    with_texts = bool(sides)
    for place, runs in own.items():
        sides[place] = {name: scored(run, data_dir, with_texts=with_texts) for name, run in runs.items()}
    return [sides[place] for place in range(len(paths))]


def plain_pair(sides: Sides) -> tuple[Mapping[str, Run], Mapping[str, Run]] | None:
    """Return two runs of glmtune with one answer to each question, which can have a verdict; None for others.

    Args:
        sides: of any number.
    """
    if len(sides) != 2:
        return None
    first, second = (
        {
            name: each.run
            for name, each in side.items()
            if each.run is not None and not each.run.is_sampled and not each.repeats
        }
        for side in sides
    )
    return (first, second) if (len(first), len(second)) == (len(sides[0]), len(sides[1])) else None


def compare_each(
    sides: Sides, names: Sequence[str], *, confidence: float, average: str | None, cluster: str | None
) -> Matrix:
    """Compare every two of several runs on the benchmarks that all have.

    Args:
        sides: at least two.
        names: as they were given, in the same order.
        confidence: of the intervals.
        average: ``accuracy_micro`` or ``accuracy_macro``; None takes the one that a benchmark publishes.
        cluster: ``subject`` or ``cluster``; None takes every question for itself.

    Raises:
        DataError: they ran other benchmarks, or other questions.
    """
    benchmarks = {
        name: _benchmark([side[name] for side in sides], confidence, average, cluster)
        for name in _common(sides, names)
    }
    keys = [(name, places) for name, each in benchmarks.items() for places in each.pairs]
    # One family over all pairs and benchmarks: every one of them is a chance of a false alarm.
    tested = corrected([benchmarks[name].pairs[places] for name, places in keys])
    done = dict(zip(keys, tested, strict=True))
    finished = {
        name: BenchmarkMatrix(
            each.title,
            each.average,
            each.scores,
            each.metrics,
            {places: done[name, places] for places in each.pairs},
            each.repeats,
        )
        for name, each in benchmarks.items()
    }
    runs = tuple(
        Shown(_mark(place), next(iter(side.values())).model, str(name), next(iter(side.values())).tool)
        for place, (side, name) in enumerate(zip(sides, names, strict=True))
    )
    pooled = _pool(finished, confidence) if len(finished) > 1 else {}
    return Matrix(runs, finished, pooled, confidence, cluster)


def _common(sides: Sides, names: Sequence[str]) -> list[str]:
    """Return the benchmarks; where every side has one alone, they are the same by whatever name."""
    if all(len(side) == 1 for side in sides):
        first = next(iter(sides[0]))
        for side in sides[1:]:
            side[first] = side.pop(next(iter(side)))
        return [first]
    for side, name in zip(sides[1:], names[1:], strict=True):
        alone = sorted(sides[0].keys() ^ side.keys())
        if alone:
            raise DataError(
                f"{', '.join(alone)} was run in one of {names[0]} and {name} only. Evaluate the other on it"
                " too, or name single benchmarks: their folders, or files of samples."
            )
    return list(sides[0])


def _benchmark(
    runs: Sequence[ScoredRun], confidence: float, average: str | None, cluster: str | None
) -> BenchmarkMatrix:
    first = runs[0]
    chosen = average or first.average
    outcomes = aligned(runs)
    pairs = {
        (one, two): difference_of(
            outcomes[one], outcomes[two], chosen, confidence=confidence, cluster=cluster
        )
        for one, two in itertools.combinations(range(len(runs)), 2)
    }
    scores = tuple(_score(outcomes[0], each, chosen) for each in outcomes)
    repeats = tuple(tuple(average_of(first.outcomes, each, chosen) for each in run.repeats) for run in runs)
    return BenchmarkMatrix(first.title, chosen, scores, tuple(run.metric for run in runs), pairs, repeats)


def _score(first: Sequence[Outcome], outcomes: Sequence[Outcome], average: str) -> Score:
    """Average a run by the subjects of the first, which other tools name otherwise."""
    named = [
        Outcome(one.subject, one.index, each.is_correct, each.is_unparsed, each.is_truncated, each.score)
        for one, each in zip(first, outcomes, strict=True)
    ]
    summary = summarize_outcomes(named, Groups(headline=average))
    return summary.micro if average == "accuracy_micro" else summary.macro


def _pool(benchmarks: Mapping[str, BenchmarkMatrix], confidence: float) -> dict[tuple[int, int], Pooled]:
    places = list(next(iter(benchmarks.values())).pairs)
    found = [
        pool([each.pairs[pair] for each in benchmarks.values()], confidence=confidence) for pair in places
    ]
    means: list[Difference] = corrected([each.mean for each in found])
    return {
        pair: Pooled(mean, each.p_exact, each.num_benchmarks)
        for pair, mean, each in zip(places, means, found, strict=True)
    }


def _mark(place: int) -> str:
    """Return a letter for a run: A to Z, then AA.

    >>> [_mark(place) for place in (0, 25, 26, 27)]
    ['A', 'Z', 'AA', 'AB']
    """
    first, second = divmod(place, 26)
    return (chr(ord("A") + first - 1) if first else "") + chr(ord("A") + second)


def default_table_folder(sides: Sides, names: Sequence[str]) -> Path:
    """Return where a table of runs goes if no folder is named; the same one always goes to the same place.

    Args:
        sides: the runs.
        names: as they were given.
    """
    digest = hashlib.sha256(json.dumps([str(Path(name).resolve()) for name in names]).encode()).hexdigest()
    words = ("+".join(sides[0]), f"{len(sides)}_runs", digest[:8])
    return DEFAULT_FOLDER / "-".join(re.sub(r"[^\w.+-]+", "_", word)[:64] for word in words)
