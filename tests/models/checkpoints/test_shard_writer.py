"""The one writer of weight files: for saves, quantized copies and exports."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glmtune.loading import load_base
from glmtune.models.checkpoints import shard_writer
from glmtune.models.checkpoints.shard_writer import LazyTensors, write_shards
from glmtune.models.checkpoints.writing import save_official

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"
EMBEDDING = torch.arange(12.0).view(4, 3)
TENSORS = {"embedding": EMBEDDING, "norm": torch.ones(3), "head": EMBEDDING}  # a tied head
DTYPES = {"embedding": torch.float32, "norm": torch.float16, "head": torch.float32}


def lazy(tensors: dict[str, Tensor]) -> LazyTensors:
    makers = {name: partial(tensors.__getitem__, name) for name in tensors}
    return LazyTensors(makers, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def test_tensors_that_share_memory_get_bytes_of_their_own(tmp_path: Path) -> None:
    written = write_shards(tmp_path, lazy(TENSORS), dtypes=DTYPES, max_shard_bytes=2**20)
    assert written.files == (tmp_path / "model.safetensors",)
    assert written.num_bytes == 2 * 48 + 6
    found = load_file(written.files[0])
    assert all(torch.equal(found[name], tensor.to(DTYPES[name])) for name, tensor in TENSORS.items())
    assert {name: tensor.dtype for name, tensor in found.items()} == DTYPES


def test_shards_and_their_index(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    written = write_shards(
        tmp_path, lazy(TENSORS), dtypes=DTYPES, max_shard_bytes=60, on_shard=lambda *step: steps.append(step)
    )
    assert steps == [(1, 2), (2, 2)]
    assert [file.name for file in written.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    first, second = (file.name for file in written.files[:2])
    index = json.loads(written.files[2].read_text())
    assert index["weight_map"] == {"embedding": first, "norm": first, "head": second}
    assert index["metadata"]["total_size"] == written.num_bytes


def test_a_failed_write_keeps_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, lazy(TENSORS), dtypes=DTYPES, max_shard_bytes=2**20)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(shard_writer, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        write_shards(tmp_path, lazy(TENSORS), dtypes=DTYPES, max_shard_bytes=2**20)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_codes_and_scales_are_never_cast(tmp_path: Path) -> None:
    model = load_base(GOLDEN / "chatglm2", dtype="float32", device="cpu", quantization="int4-g32-asym")
    save_official(model, tmp_path / "own")
    save_official(model, tmp_path / "cast", dtype=torch.bfloat16)
    own, cast = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "cast"))
    is_quantized = {f"{key.removesuffix('_scale')}{end}" for key in own if key.endswith("weight_scale")
                    for end in ("", "_scale", "_zero")}  # fmt: skip
    assert is_quantized <= own.keys()
    for name, tensor in own.items():
        assert cast[name].dtype == (tensor.dtype if name in is_quantized else torch.bfloat16), name
        if name in is_quantized:
            assert torch.equal(cast[name], tensor)
