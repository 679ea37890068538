"""Where data is found, in which order, and what can be downloaded."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from evaluation.benchmarks.sources import data_root, download_of, downloads
from evaluation.benchmarks.tasks import BENCHMARKS, make_task
from glmtune.data.reading.shipped import shipped_folder
from glmtune.errors import ConfigError, DataError


def place(root: Path, name: str, subject: str) -> Path:
    """A copy of the shipped MMLU set with one subject only, told apart by it."""
    folder = root / name
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        file = f"{split}/{subject}_{split}.csv"
        shutil.copy(shipped_folder() / "mmlu_sample" / file, folder / file)
    rows = f'{{"rows": {{"dev": {{"{subject}": 5}}, "test": {{"{subject}": 15}}}}}}'
    (folder / "sample_set.json").write_text(rows, encoding="utf-8")
    return folder


def subjects(**settings: str | Path) -> set[str]:
    return {sample.subject for sample in make_task("mmlu", **settings).samples}


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLMTUNE_DATA", raising=False)
    assert len(subjects()) == 4
    place(tmp_path / "data", "mmlu", "high_school_biology")
    assert subjects() == {"high_school_biology"}
    place(tmp_path / "mine", "MMLU", "high_school_chemistry")
    monkeypatch.setenv("GLMTUNE_DATA", str(tmp_path / "mine"))
    assert subjects() == {"high_school_chemistry"}
    given = place(tmp_path / "given", "anything", "high_school_geography")
    assert subjects(data_dir=given) == {"high_school_geography"}
    assert len(subjects(data_dir="sample")) == 4
    monkeypatch.setenv("GLMTUNE_DATA", str(tmp_path / "given"))
    assert subjects() == {"high_school_biology"}


def test_folders_that_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"`benchmark.data_dir` is `.*gone`, but there is no such folder"):
        make_task("mmlu", data_dir=tmp_path / "gone")
    (tmp_path / "notes").mkdir()
    with pytest.raises(
        DataError, match=r"the files of mmlu are neither there .* \(it holds: notes\).*data fetch mmlu"
    ):
        make_task("mmlu", data_dir=tmp_path)
    monkeypatch.setenv("GLMTUNE_DATA", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"`GLMTUNE_DATA` is `.*gone`, but there is no such folder"):
        make_task("mmlu")
    monkeypatch.delenv("GLMTUNE_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the data of mgsm_zh is nowhere"):
        make_task("mgsm_zh")


def test_downloads_are_complete() -> None:
    assert set(downloads()) <= set(BENCHMARKS)
    assert {"mmlu", "ceval", "gsm8k", "bbh"} <= set(downloads())
    for name, download in downloads().items():
        assert download.name == name
        assert download.licence in BENCHMARKS[name].licence
        assert download.home.startswith("https://")
        assert all(file.url.startswith("https://") for file in download.files)
        assert all(file.sha256 == "" or len(file.sha256) == 64 for file in download.files)
    bbh = download_of("bbh").files
    assert len(bbh) == 54
    assert {f"bbh/{subject}.json" for subject in BENCHMARKS["bbh"].subjects} < {file.path for file in bbh}
    with pytest.raises(ConfigError, match=r"The name to fetch is `mmul`.*Did you mean `mmlu`"):
        download_of("mmul")


def test_checksums_are_those_of_the_official_files(benchmarks_data: Path) -> None:
    checked = 0
    for name, folder in (("gsm8k", "gsm8k"), ("mgsm_zh", "gsm8k_zh"), ("bbh", "bbh")):
        for file in download_of(name).files:
            if file.sha256:
                data = (benchmarks_data / folder / file.path).read_bytes()
                assert hashlib.sha256(data).hexdigest() == file.sha256, file.path
                checked += 1
    assert checked == 57


def test_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLMTUNE_DATA", raising=False)
    assert data_root() == Path("data")
    monkeypatch.setenv("GLMTUNE_DATA", str(tmp_path))
    assert data_root() == tmp_path
