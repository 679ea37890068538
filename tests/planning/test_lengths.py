"""Lengths left to the data: measured where rows and tokenizer are here, else assumed, and a note says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmtune.data.settings import DataSettings
from glmtune.models.settings import ModelSettings
from glmtune.planning.lengths import ASSUMED_TOKENS, with_lengths
from glmtune.training.config import RunConfig


def config(model: str = "chatglm2-6b", **data: object) -> RunConfig:
    return RunConfig(model=ModelSettings(source=model), data=DataSettings(**data))  # type: ignore[arg-type]


def limits(found: RunConfig) -> tuple[int | None, int | None]:
    return found.data.max_source_length, found.data.max_target_length


def test_given_lengths_stay() -> None:
    given = config(max_source_length=64, max_target_length=128)
    assert with_lengths(given) == (given, "")


@pytest.mark.parametrize("data", [{}, {"train_file": "absent.json"}, {"train_file": "owner/name"}])
def test_without_rows_a_length_is_assumed_and_named(data: dict[str, str]) -> None:
    found, note = with_lengths(config(max_target_length=100, **data))
    assert limits(found) == (ASSUMED_TOKENS, 100)
    assert note == f"`data.max_source_length`: {ASSUMED_TOKENS} tokens, assumed, as the rows are not at hand."


def test_packed_rows_hold_what_is_assumed() -> None:
    found, _ = with_lengths(config(packing=True, packing_length=400))
    assert sum(length or 0 for length in limits(found)) < 400


def test_rows_at_hand_are_measured(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "颜色" * 300, "response": "白"}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    found, note = with_lengths(config(str(tiny_base), train_file=str(tmp_path / "rows.json")))
    assert found.data.max_target_length == 8
    assert (found.data.max_source_length or 0) > 32
    assert "training rows have it" in note
