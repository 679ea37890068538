"""Optuna chooses: it finds the valley of a made-up objective, and goes on exactly where a kill came."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from glmtune.errors import DataError, MissingExtraError
from glmtune.sweep.search import OptunaSearch, require_optuna
from glmtune.sweep.space import Axis, Choices, Interval, Point

AXES: list[Axis] = [
    Interval("rate", 1e-5, 1.0, is_log=True),
    Interval("length", 4, 64, is_int=True),
    Choices("+recipe", ("ptuning", "lora")),
]
pytest.importorskip("optuna")


def objective(point: Point) -> float | None:
    rate, length, recipe = (value for _, value in point.values)
    return (math.log10(float(rate)) + 2) ** 2 + abs(int(length) - 32) / 32 + (recipe == "lora")


def search(
    file: Path, total: int, value_of: Callable[[Point], float | None] = objective, *, stop: int | None = None
) -> list[Point]:
    """Go through a study as the sweep does; ``stop`` ends it as a kill would, in the middle of a trial."""
    study = OptunaSearch(file, AXES, larger_is_better=False, seed=7)
    found: list[Point] = []
    for point in study.points(total, value_of):
        found.append(point)
        if len(found) == stop:
            break
    return found


def test_what_is_drawn_is_allowed_and_gets_better(tmp_path: Path) -> None:
    points = search(tmp_path / "study", 40)
    assert len(points) == 40
    for point in points:
        rate, length, recipe = (value for _, value in point.values)
        assert 1e-5 <= float(rate) <= 1
        assert 4 <= int(length) <= 64
        assert recipe in ("ptuning", "lora")
        assert len(rate.replace("0.", "").partition("e")[0].strip("0").replace(".", "")) <= 4
    scores = [objective(point) or 0.0 for point in points]
    assert sum(scores[20:]) < sum(scores[:10]) * 2, "it has learnt where the good ones are"
    assert min(scores) < 0.6


@pytest.mark.parametrize("stop", [1, 6, 13])
def test_a_search_that_was_killed_chooses_as_one_that_was_not(stop: int, tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", 15)
    begun = search(tmp_path / "study", 15, stop=stop)
    assert begun == whole[:stop]
    assert search(tmp_path / "study", 15) == whole, "the one that ran is run again, the rest follows from it"
    assert search(tmp_path / "study", 17)[:15] == whole, "a search may grow"
    assert search(tmp_path / "study", 4) == whole[:4]


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "study"
    whole = search(tmp_path / "whole", 6)
    search(file, 3)
    with file.open("a") as study:
        study.write('{"op_code": 5, "worker')
    assert search(file, 6) == whole


def test_a_point_that_fails_is_told_as_failed(tmp_path: Path) -> None:
    def broken(point: Point) -> float | None:
        return None if point.values[2][1] == "lora" else objective(point)

    assert len(search(tmp_path / "study", 12, broken)) == 12


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "study").write_text("[1]\n")
    with pytest.raises(DataError, match="no study of Optuna"):
        search(tmp_path / "study", 3)


def test_without_optuna_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"`sweep.search=optuna` needs.*glmtune\[sweeps\]"):
        require_optuna()
