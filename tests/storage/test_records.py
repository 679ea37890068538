"""Descriptions of what files hold: nothing is converted, and errors name key and value whatever these are."""

from __future__ import annotations

import json
import math

import pytest

from glmtune.storage.records import MAX_COUNT, Count, Record, Text, shown, validated


class Inner(Record):
    ratio: float


class Outer(Record):
    name: Text
    size: Count = 0
    inner: Inner | None = None


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


def test_values_come_out_as_they_went_in_and_further_keys_pass():
    found = validated(Outer, {"name": "x", "size": 3, "inner": {"ratio": 0.5}, "theirs": [1]})
    assert found == Outer(name="x", size=3, inner=Inner(ratio=0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the field `name` is missing"),
        ({"name": 5}, "`name` is 5, but it must be a text"),
        ({"name": "x", "size": "3"}, '`size` is "3", but it must be a whole number from 0'),
        ({"name": "x", "size": True}, "`size` is true, but"),
        ({"name": "x", "size": -1}, "`size` is -1, but"),
        ({"name": "x", "size": MAX_COUNT + 1}, "`size` is 9007199254740993, but"),
        ({"name": "x", "inner": {"ratio": math.nan}}, "`inner.ratio` is NaN, but input should be a finite"),
        ({"name": "x", "inner": {"ratio": 10**400}}, "`inner.ratio` is 1000"),
        ({"name": "x" * 9, "theirs": nested(65)}, "`theirs` is nested more than 64 deep"),
        ({"name": [["long"] * 99]}, r'`name` is \[\["long", .*\.\.\., but it must be a text'),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        validated(Outer, values)
    assert len(str(caught.value)) < 200


def test_any_value_can_be_shown():
    assert shown("\ud800") == '"\ud800"'
    assert shown({1, 2}) == "set"
    assert shown(10**5000) == "int"
