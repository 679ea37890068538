"""What was tuned on a base works on that base quantized, also in an export; other bases are refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from glmtune.adapter import load_adapter
from glmtune.errors import CheckpointError
from glmtune.export.export import export
from glmtune.export.source import ExportJob
from glmtune.loading import load_base, load_model
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.checkpoint import PrefixMeta, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.quantization.files.write import QuantizeJob, quantize_checkpoint
from glmtune.storage.manifest import write_manifest
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings


def prefix_for(base: Path, folder: Path, template: str) -> Path:
    """A prefix that says it was trained on a base."""
    model = load_base(base, device="cpu")
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
    torch.nn.init.normal_(encoder.embedding.weight, std=0.5)
    meta = PrefixMeta(base_fingerprint=model.fingerprint(), base_source="the release", template=template)
    return save_prefix(encoder, folder, meta=meta)


def job(source: Path, folder: Path, prefix: Path) -> ExportJob:
    return ExportJob(
        source=str(source), format="official", output_dir=folder, family=None, prefix_path=str(prefix),
        adapter_path=None, dtype=torch.float32, max_shard_bytes=2**30, overwrite=False,
    )  # fmt: skip


def test_a_prefix_of_the_plain_base_is_exported_with_the_quantized_one(
    tiny_base: Path, tmp_path: Path
) -> None:
    file = prefix_for(tiny_base, tmp_path / "prefix", "chatglm2")
    quantized = quantize_checkpoint(QuantizeJob(str(tiny_base), "int4-g32", tmp_path / "quantized")).folder
    for source in (quantized, tiny_base):
        method = "int4-g32" if source == tiny_base else None
        assert load_model(source, quantization=method, prefix=file, device="cpu").quantization == "int4-g32"  # type: ignore[attr-defined]
    exported = export(job(quantized, tmp_path / "out", file))
    expected = load_model(quantized, prefix=file, dtype="float32", device="cpu")
    again = load_base(exported.folder, dtype="float32", device="cpu")
    attach_prefix(again, load_prefix(exported.folder / "prefix_encoder", again))
    ids = torch.tensor([[5, 9, 13, 7, 11]])
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=0
        )


def test_a_quantized_release_that_names_no_parent_takes_a_prefix_with_a_warning(
    oracles: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Released INT4 files do not say which weights they were; a prefix of the half precision release fits."""
    file = prefix_for(oracles / "v2" / "checkpoint_bin", tmp_path, "chatglm2")
    with caplog.at_level(logging.WARNING):
        load_model(oracles / "v2" / "int4", prefix=file, device="cpu")
        export(job(oracles / "v2" / "int4", tmp_path / "out", file))
    assert sum("cannot be checked" in text for text in caplog.messages) == 2
    stranger = prefix_for(oracles / "v2" / "checkpoint_bin", tmp_path / "other", "chatglm3")
    with pytest.raises(CheckpointError, match="trained on another base: `the release`"):
        load_model(oracles / "v2" / "int4", prefix=stranger, device="cpu")


def test_a_base_that_names_its_parent_refuses_strangers(
    tiny_base: Path, oracles: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny_base, wrong)
    model = load_base(wrong, device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
    model.save_pretrained(wrong)
    file = prefix_for(wrong, tmp_path / "prefix", "chatglm2")
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_model(tiny_base, quantization="int8", prefix=file, device="cpu")
    quantized = quantize_checkpoint(QuantizeJob(str(tiny_base), "int8", tmp_path / "quantized")).folder
    with pytest.raises(CheckpointError, match="trained on another base"):
        export(job(quantized, tmp_path / "out", file))


def test_adapters_follow_the_same_rule(
    oracles: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base(oracles / "v2" / "checkpoint_bin", device="cpu")
    fingerprint = base.fingerprint()
    tune_adapter(base, LoraSettings(rank=2)).save(tmp_path)
    write_manifest(tmp_path, {"base_fingerprint": fingerprint})
    load_adapter(tmp_path, load_base(oracles / "v2" / "checkpoint_bin", device="cpu", quantization="int4"))
    assert not caplog.messages
    load_adapter(tmp_path, load_base(oracles / "v2" / "int4", device="cpu"))
    assert "whether they belong together cannot be checked" in caplog.text
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "THUDM/chatglm3-6b"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_manifest(tmp_path, {"base_fingerprint": fingerprint})
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_adapter(tmp_path, load_base(oracles / "v2" / "int4", device="cpu"))
