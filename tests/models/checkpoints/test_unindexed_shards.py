"""Shards without an index are read by their names and headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmtune.errors import CheckpointError
from glmtune.models.load import load_official

IDS = torch.tensor([[3, 5, 8, 4]])


def sharded(base: Path, folder: Path, kind: str, count: int = 3) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    weights = list(load_file(base / "model.safetensors").items())
    for number in range(count):
        part = dict(weights[number::count])
        if kind == "bin":
            torch.save(part, folder / f"pytorch_model-{number + 1:05}-of-{count:05}.bin")
        else:
            save_file(part, folder / f"model-{number + 1:05}-of-{count:05}.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_all_shards_are_read(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    model = load_official(sharded(tiny_base, tmp_path / "shards", kind))
    assert torch.equal(model(IDS).logits, load_official(tiny_base)(IDS).logits)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_missing_shard_is_named(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    folder = sharded(tiny_base, tmp_path / "shards", kind)
    next(folder.glob("*00002-of*")).unlink()
    with pytest.raises(CheckpointError, match=r"shards of 3 files, but 1 .*model-00002-of-00003"):
        load_official(folder)


def test_two_saves_in_one_folder_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = sharded(tiny_base, tmp_path / "shards", "safetensors")
    (folder / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match="several saves, in 2 and 3 files"):
        load_official(folder)


def test_a_file_of_another_name_is_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = sharded(tiny_base, tmp_path / "shards", "safetensors", count=1)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "chatglm.safetensors")
    with pytest.raises(
        CheckpointError, match=r"chatglm\.safetensors: rename the model's to model\.safetensors"
    ):
        load_official(folder)


def test_a_huge_count_makes_no_list(tiny_base: Path, tmp_path: Path) -> None:
    folder = sharded(tiny_base, tmp_path / "shards", "safetensors")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "model-00001-of-99999.safetensors").touch()
    with pytest.raises(CheckpointError, match="not there"):
        load_official(folder)
