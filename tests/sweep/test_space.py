"""Points: their order, their names, what is checked of them, and numbers drawn from intervals."""

from __future__ import annotations

import pytest

from glmtune.errors import ConfigError
from glmtune.sweep.space import Axis, Choices, Interval, Point, corners, grid

RATE = Choices("trainer.learning_rate", ("0.001", "0.02"))
RECIPE = Choices("+recipe", ("ptuning", "lora"))
DECAY = Interval("trainer.weight_decay", 1e-4, 0.1, is_log=True)


def test_a_grid_has_every_point_once_the_last_setting_changing_first() -> None:
    assert [point.words for point in grid([RATE, RECIPE])] == [
        ["trainer.learning_rate=0.001", "+recipe=ptuning"],
        ["trainer.learning_rate=0.001", "+recipe=lora"],
        ["trainer.learning_rate=0.02", "+recipe=ptuning"],
        ["trainer.learning_rate=0.02", "+recipe=lora"],
    ]


def test_an_interval_has_no_grid() -> None:
    with pytest.raises(ConfigError, match=r"interval from 0.0001 to 0.1, .*`grid`.*sweep.search=optuna"):
        grid([RATE, DECAY])


@pytest.mark.parametrize(
    ("axes", "limit", "expected"),
    [
        pytest.param([RATE, DECAY], 4, 4, id="few"),
        pytest.param([RATE, DECAY], 3, 3, id="one-after-the-other"),
        pytest.param([Choices("a", tuple("abcdef")), Choices("b", tuple("uvw"))], 10, 8, id="many"),
    ],
)
def test_corners_hold_every_value(axes: list[Axis], limit: int, expected: int) -> None:
    found = corners(axes, limit=limit)
    assert len(found) == len(set(found)) == expected
    for place, axis in enumerate(axes):
        assert {point.values[place][1] for point in found} == set(axis.ends)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0123456, "0.01235"), (1.23456e-4, "0.0001235"), (0.0999999, "0.1"), (1e-4, "0.0001")],
)
def test_numbers_of_an_interval_are_rounded_and_stay_in_it(value: float, expected: str) -> None:
    assert DECAY.written(value) == expected
    assert 1e-4 <= float(DECAY.written(value)) <= 0.1


def test_rounding_does_not_leave_the_interval() -> None:
    assert Interval("a", 0.12346, 0.99994).written(0.99994) == "0.9999"
    assert Interval("a", 0.12344, 0.5).written(0.12344) == "0.12344"
    assert Interval("a", 1, 8, is_int=True).written(7.6) == "8"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        pytest.param(
            (("trainer.learning_rate", "1e-05"), ("+recipe", "lora")),
            "learning_rate=1e-05_recipe=lora",
            id="plain",
        ),
        pytest.param((("a.x", "1"), ("b.x", "2")), "a.x=1_b.x=2", id="alike"),
    ],
)
def test_names_say_what_a_point_is(values: tuple[tuple[str, str], ...], name: str) -> None:
    assert Point(values).name == name


def test_names_of_any_text_are_names_of_folders_and_differ() -> None:
    texts = ["a/b.jsonl", "a:b.jsonl", "'训练集.jsonl'", "'验证集.jsonl'", "x" * 400, "x" * 401]
    names = [Point((("data.train_file", text),)).name for text in texts]
    assert len(set(names)) == len(texts)
    assert all(len(name) < 140 and "/" not in name and name.isascii() for name in names)
