"""Weight files are opened once, however many tensors are in them."""

from __future__ import annotations

import builtins
import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.loading import load_base
from glmtune.models.checkpoints.shards import OpenShards, read_records, read_tensor, weight_files
from glmtune.models.load import load_official

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each weight file is opened."""
    counts: Counter[str] = Counter()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def count(file: Any, *args: Any, **options: Any) -> Any:
            name = Path(file).name if isinstance(file, str | Path) else ""
            if name.endswith((".safetensors", ".bin")):
                counts[name] += 1
            return real(file, *args, **options)

        return count

    monkeypatch.setattr(io, "open", counting(io.open))  # Path.open
    monkeypatch.setattr(builtins, "open", counting(builtins.open))  # torch.load of a path
    return counts


@pytest.mark.parametrize("form", ["checkpoint_safetensors", "checkpoint_bin_sharded"])
def test_a_load_opens_each_shard_once(form: str, oracles: Path, opened: Counter[str]) -> None:
    folder = oracles / "v2" / form
    load_official(folder, device="cpu")
    assert opened == dict.fromkeys([file.name for file in weight_files(folder)], 1)
    assert len(opened) > 1


@pytest.mark.parametrize("quantization", [None, "int4-g32-asym"])
def test_so_does_one_that_quantizes(quantization: str | None, opened: Counter[str]) -> None:
    load_base(GOLDEN / "chatglm2", device="cpu", quantization=quantization)
    assert opened == {f"model-0000{number}-of-00002.safetensors": 1 for number in (1, 2)}


def test_files_are_closed_at_the_end(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "glm4" / "pytorch_model.bin", tmp_path)
    with OpenShards() as shards:
        records = read_records(tmp_path, shards)
        tensors = {name: shards.read(record) for name, record in records.items()}
        stream = shards.stream(tmp_path / "pytorch_model.bin")
        assert not stream.closed
    assert stream.closed
    assert all(torch.equal(read_tensor(records[name]), tensor) for name, tensor in tensors.items())
