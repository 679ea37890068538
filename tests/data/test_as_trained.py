"""What shaped a run's prompts is found beside what it tuned, and taken over where nobody said otherwise."""

from __future__ import annotations

import json
import logging

import pytest
import yaml

from glmtune.data.as_trained import KEY, as_trained, record, trained_with
from glmtune.data.settings import DataSettings
from glmtune.settings import remember_references
from glmtune.storage.manifest import write_manifest

RUN = DataSettings(
    max_source_length=256, max_target_length=96, source_prefix="p:", prompt_column="问", response_column="答"
)


@pytest.fixture
def run(tmp_path):
    """A run folder of today."""
    (tmp_path / "last").mkdir()
    write_manifest(tmp_path / "last", {KEY: record(RUN, "be kind")})
    config = {"tune": "prefix", "data": {"max_source_length": None, "max_target_length": None}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_the_record_is_found_from_every_place_of_a_run(run) -> None:
    expected = {**record(RUN), "system": "be kind", "not_recorded": []}
    assert trained_with(run / "last") == expected
    assert trained_with(run) == expected
    other = {**record(RUN), "max_source_length": 8}
    assert trained_with(run / "last", json.dumps(other))["max_source_length"] == 8, (
        "the file's own comes first"
    )


@pytest.mark.parametrize("place", ["", "last", "best", "checkpoint-7"])
def test_older_runs_have_their_config(tmp_path, place: str) -> None:
    data = {
        "max_source_length": 64,
        "max_target_length": 128,
        "source_prefix": "${oc.env:SECRET}",
        "name": "x",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"tune": "lora", "data": data}))
    (tmp_path / place).mkdir(exist_ok=True)
    found = trained_with(tmp_path / place)
    assert found == {"max_source_length": 64, "max_target_length": 128, "not_recorded": ["source_prefix"]}
    _, words = as_trained(DataSettings(), found, ())
    assert "data.source_prefix came from the environment and must be given again" in words


def test_config_files_of_others_tell_nothing(tmp_path) -> None:
    assert trained_with(tmp_path) is None
    (tmp_path / "config.yaml").write_text("data: {max_source_length: 5}\n")
    assert trained_with(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"max_source_length": "many"}', '{"max_target_length": 0}', '{"layout": "x"}', '{"not_recorded": [[]]}',
     '{"source_prefix": ' + "[" * 500 + "]" * 500 + "}"],
)  # fmt: skip
def test_what_is_no_record_is_said_and_passed_over(tmp_path, caplog, text: str) -> None:
    with caplog.at_level(logging.WARNING):
        assert trained_with(tmp_path, text) is None
    assert "cannot be read for the data settings" in caplog.text


def test_secrets_of_the_environment_are_not_recorded() -> None:
    settings = DataSettings(source_prefix="token-7", max_source_length=8, max_target_length=8)
    from recipes.predict import PredictConfig

    remember_references(PredictConfig(data=settings), {"data.source_prefix": "${oc.env:TOKEN}"})
    try:
        found = record(settings)
    finally:
        remember_references(PredictConfig(), {})
    assert "token-7" not in json.dumps(found)
    assert found["not_recorded"] == ["source_prefix"]


def test_given_settings_win() -> None:
    asked = DataSettings(max_source_length=64, max_target_length=64)
    taken, words = as_trained(asked, record(RUN), ("max_target_length",))
    assert (taken.max_source_length, taken.max_target_length, taken.source_prefix) == (256, 64, "p:")
    assert (taken.prompt_column, taken.response_column) == ("问", "答")
    assert "data.max_source_length=256" in words
    assert "data.max_target_length=64 is given (the run had 96)" in words


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"layout": "adgen"}, ()),  # of a data set that is named
        ({"layout": "adgen"}, ("layout",)),
        ({}, ("layout",)),
        ({"prompt_column": "a", "response_column": "b"}, ("prompt_column", "response_column")),
    ],
)
def test_columns_belong_together(asked: dict, given: tuple[str, ...]) -> None:
    settings = DataSettings(**asked)
    taken, _ = as_trained(settings, record(RUN), given)
    assert (taken.layout, taken.prompt_column) == (settings.layout, settings.prompt_column)
    assert taken.max_source_length == 256
