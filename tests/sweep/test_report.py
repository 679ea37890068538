"""What readers get: a table that says what is known, files of the same figures, a picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from glmtune.sweep.metrics import Metric
from glmtune.sweep.report import failures, sweep_table, verdict, write_sweep
from glmtune.sweep.space import Point
from glmtune.sweep.statistics import PointResult, Ranking, rank
from glmtune.sweep.trials import TrialRecord

LOSS = Metric("eval_loss", "train", False, "nats")
WORSE, GOOD = (
    Point((("trainer.lr", "0.001"), ("+recipe", "lora"))),
    Point((("trainer.lr", "0.02"), ("+recipe", "训练"))),
)


def ranking(*seeds: int) -> Ranking:
    values = {1: (2.0, 1.0), 2: (2.01, 1.02), 3: (1.99, 1.01)}
    return rank(
        [PointResult(point, {seed: values[seed][place] for seed in seeds}) for place, point in enumerate((WORSE, GOOD))],
        larger_is_better=False,
    )  # fmt: skip


def test_one_seed_says_so() -> None:
    table = sweep_table(ranking(1), LOSS, "title")
    assert table.columns == ("rank", "lr", "recipe", "eval_loss")
    assert table.rows == (("1", "0.02", "训练", "1.0000"), ("2", "0.001", "lora", "2.0000"))
    assert "one seed a point" in table.caption
    said = verdict(ranking(1), LOSS)
    assert said[0] == "best: trainer.lr=0.02 +recipe=训练 (eval_loss 1.0000)"
    assert "`sweep.repeats=3`" in said[1]


def test_several_seeds_tell_how_sure_it_is() -> None:
    table = sweep_table(ranking(1, 2, 3), LOSS, "title")
    assert table.columns[3:] == ("eval_loss", "95 % interval", "seeds", "chance of best", "p", "verdict")
    assert table.rows[0][3:6] == ("1.0100", "0.9852 to 1.0348", "3")
    assert table.rows[0][-1] == "best mean"
    assert table.rows[1][-3:] == ("0 %", "< 0.001", "worse")
    said = " ".join(verdict(ranking(1, 2, 3), LOSS))
    assert "all 1 others are significantly worse" in said
    assert "expect 1.0100 of a new seed" in said


def test_points_that_cannot_be_told_apart() -> None:
    alike = rank(
        [PointResult(Point((("a", name),)), dict(enumerate(values))) for name, values in (("1", [1.0, 2.0]), ("2", [1.1, 2.1]))],
        larger_is_better=False,
    )  # fmt: skip
    assert [row[-1] for row in sweep_table(alike, LOSS, "").rows] == ["best mean", "may be the best"]
    assert "1 of 1 others cannot be told apart" in verdict(alike, LOSS)[1]


def test_failures_are_listed() -> None:
    broken = [PointResult(WORSE, {1: 1.0}, dict.fromkeys(range(2, 10), "no memory"))]
    table = sweep_table(rank(broken, larger_is_better=False), LOSS, "")
    assert (table.columns[-1], table.rows[0][-1]) == ("failed", "8")
    said = failures(broken)
    assert said[0] == "! lr=0.001_recipe=lora_seed=2: no memory"
    assert said[-1] == "! and 3 more"
    assert verdict(rank([PointResult(WORSE, {}, {1: "no"})], larger_is_better=False), LOSS) == [
        "no point has a figure: every trial failed"
    ]


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)], ids=["one seed", "three seeds"])
def test_the_files_say_the_same(seeds: tuple[int, ...], tmp_path: Path) -> None:
    found = ranking(*seeds)
    records = {
        "lr=0.001_recipe=lora_seed=1": TrialRecord("", (), "done", {"eval_loss": 2.0, "train_loss": 3.0}, 4.5)
    }
    paths = write_sweep(
        tmp_path, found, LOSS, records, title="t", commands={"train the best": "glmtune train a=1"}
    )
    assert [path.name for path in paths] == ["sweep.md", "sweep.png", "sweep.csv", "trials.csv", "sweep.json"]
    values = json.loads((tmp_path / "sweep.json").read_text("utf-8"))
    assert values["best"] == {"trainer.lr": "0.02", "recipe": "训练"}
    assert values["points"][1]["by_seed"]["1"] == 2.0
    assert values["num_candidates"] == (1 if len(seeds) > 1 else 0)
    with (tmp_path / "sweep.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["eval_loss"]) for row in rows] == [each.mean for each in found.results]
    with (tmp_path / "trials.csv").open(encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 2 * len(seeds)
    mine = next(row for row in trials if row["trial"] == "lr=0.001_recipe=lora_seed=1")
    assert (mine["train_loss"], mine["seconds"], mine["state"]) == ("3.0", "4.5", "done")
    page = (tmp_path / "sweep.md").read_text("utf-8")
    assert "- train the best: `glmtune train a=1`" in page
    first = (tmp_path / "sweep.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    write_sweep(tmp_path, found, LOSS, records, title="t", commands={})
    assert (tmp_path / "sweep.png").read_bytes() == first, "the same figures make the same bytes"


def test_a_picture_of_many_settings_and_of_no_figure(tmp_path: Path) -> None:
    many = [
        PointResult(Point(tuple((f"s{place}", value) for place in range(5))), {1: float(number + 1) ** 5})
        for number, value in enumerate(("1", "100", "null"))
    ]
    write_sweep(tmp_path, rank(many, larger_is_better=True), LOSS, {}, title="", commands={})
    nothing = rank([PointResult(WORSE, {}, {1: "no"})], larger_is_better=False)
    write_sweep(tmp_path, nothing, LOSS, {}, title="", commands={})
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] is None
