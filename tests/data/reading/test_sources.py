"""Files of named, shipped and own data sets are found, or every place looked at is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmtune.data.reading import shipped
from glmtune.data.reading.sources import find_data_file
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError

ADGEN = {"name": "adgen", "train_file": "train.json", "validation_file": "dev.json"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLMTUNE_DATA", raising=False)


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


@pytest.mark.parametrize("folder", ["data/adgen", "data/AdvertiseGen", "AdvertiseGen", "adgen"])
def test_named_sets_are_found_in_their_usual_folders(tmp_path: Path, folder: str) -> None:
    put(tmp_path / folder / "train.json")
    assert find_data_file(DataSettings(**ADGEN), "train") == f"{folder}/train.json"


@pytest.mark.parametrize("folder", ["adgen", "AdvertiseGen"])
def test_named_sets_are_found_through_the_environment(tmp_path: Path, monkeypatch, folder: str) -> None:
    file = put(tmp_path / "elsewhere" / folder / "dev.json")
    put(tmp_path / "AdvertiseGen" / "dev.json")
    monkeypatch.setenv("GLMTUNE_DATA", str(tmp_path / "elsewhere"))
    assert find_data_file(DataSettings(**ADGEN), "validation") == str(file)


def test_a_folder_given_is_the_only_one_searched(tmp_path: Path) -> None:
    put(tmp_path / "AdvertiseGen" / "train.json")
    file = put(tmp_path / "mine" / "train.json")
    put(tmp_path / "mine" / "test.json")
    assert find_data_file(DataSettings(**ADGEN, dir=str(tmp_path / "mine")), "train") == str(file)
    with pytest.raises(
        DataError, match=r"mine/dev\.json: there is no such file.*validation_file.*test\.json.*ADGEN is not"
    ):
        find_data_file(DataSettings(**ADGEN, dir=str(tmp_path / "mine")), "validation")


def test_own_path_in_a_named_set(tmp_path: Path) -> None:
    file = put(tmp_path / "x" / "rows.json")
    for given in ("x/rows.json", str(file)):
        assert find_data_file(DataSettings(name="adgen", train_file=given), "train") == given


def test_absent_named_set_says_where_it_was_looked_for_and_where_to_get_it() -> None:
    with pytest.raises(DataError) as caught:
        find_data_file(DataSettings(**ADGEN), "train")
    words = [
        "`train.json`",
        "data/adgen/train.json",
        "AdvertiseGen/train.json",
        "data.dir=",
        "GLMTUNE_DATA",
        "ChatGLM2-6B",
    ]
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_own_files_and_hub_ids(tmp_path: Path) -> None:
    put(tmp_path / "rows.json")
    assert find_data_file(DataSettings(train_file="rows.json"), "train") == "rows.json"
    assert find_data_file(DataSettings(train_file="rows.json", dir=str(tmp_path)), "train") == str(
        tmp_path / "rows.json"
    )
    assert find_data_file(DataSettings(train_file="owner/name:dev"), "train") == "owner/name:dev"
    with pytest.raises(DataError, match=r"row\.json: there is no such file.*`data.train_file`.*rows\.json"):
        find_data_file(DataSettings(train_file="row.json"), "train")


def test_test_falls_back_on_validation(tmp_path: Path) -> None:
    put(tmp_path / "dev.json")
    settings = DataSettings(validation_file="dev.json")
    assert find_data_file(settings, "test") == "dev.json"
    with pytest.raises(ConfigError, match=r"`data\.train_file` is not set"):
        find_data_file(settings, "train")


@pytest.mark.parametrize(
    ("settings", "split", "words"),
    [
        ({}, "train", ["`data.train_file` is not set", "data.train_file=FILE"]),
        ({"train_file": "a"}, "tran", ["Split is `tran`", "train"]),
        ({"name": "adgn", "train_file": "a"}, "train", ["`data.name` is `adgn`", "adgen", "files"]),
    ],
)
def test_wrong_settings(settings: dict, split: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        find_data_file(DataSettings(**settings), split)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("installed", [True, False])
def test_shipped_files_in_both_kinds_of_install(tmp_path: Path, monkeypatch, installed: bool) -> None:
    package = tmp_path / "site" / "glmtune"
    package.mkdir(parents=True)
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    with pytest.raises(DataError, match=r"_data and .*data\. Install glmtune again"):
        shipped.resolve_shipped("shipped:ads/train.jsonl")
    file = put((package / "_data" if installed else package.parent / "data") / "ads" / "train.jsonl")
    assert find_data_file(DataSettings(train_file="shipped:ads/train.jsonl"), "train") == str(file)
    with pytest.raises(
        DataError, match=r"`shipped:ads/test.jsonl` is no shipped data file.*ads/train\.jsonl"
    ):
        shipped.resolve_shipped("shipped:ads/test.jsonl")
