"""Weight files are opened once, however many tensors are in them."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.errors import CheckpointError
from glmtune.loading import load_base, load_model
from glmtune.models.checkpoints.shards import OpenShards, read_records, verifying, weight_files
from glmtune.models.load import load_official
from glmtune.models.placeholders import load_placeholders, pending_weights
from glmtune.models.settings import ModelSettings
from glmtune.storage.manifest import write_manifest
from tests.models.checkpoints.stored import read_tensor

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


# ---- the setting that leaves checksums out


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "rows": torch.ones(4, 2)[1:3]}, tmp_path / "pytorch_model.bin")
    records = read_records(tmp_path)
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    for record in records.values():
        content[record.offset] ^= 1
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    for name in records:
        with pytest.raises(CheckpointError, match="is damaged"):
            read_tensor(records[name])
        with verifying(False):
            assert not torch.equal(read_tensor(records[name]), torch.ones_like(read_tensor(records[name])))
    with pytest.raises(CheckpointError, match="is damaged"), verifying(False), verifying(True):
        read_tensor(records["a"])


def test_loading_leaves_them_out_where_it_is_asked_to(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(GOLDEN / "glm4", folder)
    record = next(iter(read_records(folder).values()))
    content = bytearray(record.file.read_bytes())
    content[record.offset] ^= 1
    record.file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model(folder, device="cpu")
    assert load_model(folder, device="cpu", verify_checksums=False) is not None
    pending = pending_weights(load_placeholders(folder, dtype=None))
    with pytest.raises(CheckpointError, match="is damaged"):
        pending.fingerprint()
    with verifying(False):
        pending = pending_weights(load_placeholders(folder, dtype=None))
    assert pending.fingerprint()
    assert ModelSettings(source=str(folder), verify_checksums=False).where["verify_checksums"] is False


def test_so_are_those_of_our_own_manifests(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chatglm2-tiny"
    shutil.copytree(tiny_base, folder)
    write_manifest(folder, {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layernorm_epsilon": 1e-4}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder, device="cpu")
    assert load_model(folder, device="cpu", verify_checksums=False).config.rms_norm_eps == 1e-4
