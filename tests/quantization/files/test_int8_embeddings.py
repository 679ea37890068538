"""Folders whose embedding and head are INT8 beside blocks of any width: written, read, tuned over, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.quantizers import AutoHfQuantizer

from glmtune.errors import CheckpointError, ConfigError
from glmtune.export.export import export
from glmtune.export.source import ExportJob
from glmtune.loading import load_base, load_model
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.quantized_layout import (
    LAYOUT_KEY,
    OUR_CODES,
    QuantizedLayout,
    packed_signs,
    unpacked_signs,
)
from glmtune.models.describe import describe
from glmtune.prefix.attach import attach_prefix, freeze_base
from glmtune.prefix.checkpoint import PrefixMeta, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.quantization.files.write import REPORT_FILE, QuantizeJob, quantize_checkpoint
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels.for_training import prepare_for_training
from glmtune.quantization.layers.apply import quantize_model
from glmtune.quantization.layers.embeddings import rounded_embeddings
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear
from tests.quantization.conftest import GOLDEN
from tests.quantization.dequantized import dequantize_model, ids, logits

METHODS = ("int4", "int4-g32-asym", "int8")


def write(source: Path, folder: Path, method: str = "int4", **options: Any) -> Path:
    return quantize_checkpoint(QuantizeJob(str(source), method, folder, embeddings="int8", **options)).folder


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """In transformers' format, its head the embedding, as in GLM-Edge's smaller siblings."""
    from glmtune.models.checkpoints.config import native_config
    from glmtune.models.load import build_model
    from glmtune.models.releases.families import Family

    values = {
        "model_type": "glm", "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 160,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True,
        "max_position_embeddings": 128, "tie_word_embeddings": True, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(3)
    config = native_config(values, Family.TRANSFORMERS)
    config.dtype = torch.float32
    model = build_model(config)
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.parametrize("method", METHODS)
def test_the_file_is_what_rounding_on_loading_gives(source: Path, method: str, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "out", method)
    stored = load_base(folder, dtype="float32", device="cpu")
    made = load_base(
        source, dtype="float32", device="cpu", quantization=method, quantization_embeddings="int8"
    )
    plain = load_base(source, dtype="float32", device="cpu", quantization=method)
    codes = dict(made.named_parameters(remove_duplicate=False))
    for name, weight in stored.named_parameters(remove_duplicate=False):
        assert torch.equal(weight, codes[name]), name
    assert torch.equal(logits(stored), logits(made))
    assert not torch.equal(logits(stored), logits(plain))
    embedding, head = stored.get_input_embeddings(), stored.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert (embedding.bits, head.bits, head.group_size) == (8, 8, None)
    is_tied = isinstance(stored.config, ChatGlmConfig)
    assert (embedding.weight is head.weight) is is_tied
    # What was tuned over the one base fits the other.
    assert stored.fingerprint() == made.fingerprint() == plain.fingerprint()
    assert stored.is_base(load_base(source, device="cpu").fingerprint())
    assert rounded_embeddings(stored) == rounded_embeddings(made) == "int8"
    assert rounded_embeddings(plain) is None
    again = load_base(folder, dtype="float32", device="cpu", quantization_embeddings="int8")
    assert torch.equal(logits(again), logits(stored)), "asked for what it is"


@pytest.mark.parametrize("method", METHODS)
def test_in_memory_and_rounded_later_are_the_same_codes(source: Path, method: str, tmp_path: Path) -> None:
    expected = load_base(write(source, tmp_path / "out", method), dtype="float32", device="cpu")
    memory = load_base(source, dtype="float32", device="cpu")
    quantize_model(memory, method, embeddings="int8", stored_dtype=memory.stored_dtype)
    later = load_base(source, dtype="float32", device="cpu", quantization=method)
    prepare_for_inference(later, embeddings="int8")
    for model, name in ((memory, "memory"), (later, "later")):
        model.save_pretrained(tmp_path / name)
        again = load_base(tmp_path / name, dtype="float32", device="cpu")
        assert torch.equal(logits(again), logits(expected))
        assert QuantizedLayout.of(again.config) == QuantizedLayout.of(expected.config)
        assert again.fingerprint() == expected.fingerprint() == model.fingerprint()


def test_a_calibrated_method_rounds_them_too(source: Path, tmp_path: Path) -> None:
    row = ids(load_base(source, device="cpu"))[0].tolist()
    rows = tuple((*row[:5], row[5 + number % 3], *row[5:]) for number in range(6))
    folder = write(source, tmp_path / "out", "int4-gptq", calibration_rows=rows)
    stored = load_base(folder, dtype="float32", device="cpu")
    made = load_base(source, dtype="float32", device="cpu", quantization_embeddings="int8")
    for part in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(stored, part)().stored_codes(), getattr(made, part)().stored_codes())
    report = json.loads((folder / REPORT_FILE).read_text())
    layers = {layer["kind"]: layer for layer in report["layers"] if ".layers." not in layer["name"]}
    assert layers
    for layer in layers.values():
        assert (layer["replaced"], layer["reason"]) == (True, "int8")
        assert layer["sqnr_db"] > 35


def test_config_json_stops_other_readers(tmp_path: Path) -> None:
    folder = write(GOLDEN / "chatglm2", tmp_path / "out", "int8")
    config = json.loads((folder / "config.json").read_text())
    assert config[LAYOUT_KEY]["embeddings"] == "int8"
    assert set(config[LAYOUT_KEY]["outer_signs"]) == {"embedding", "head"}
    assert "quantization_bit" not in config
    assert config["quantization_config"] == OUR_CODES
    with pytest.raises(ValueError, match="quant_method"):  # transformers, before it reads a weight
        AutoHfQuantizer.from_config(config["quantization_config"])
    report = json.loads((folder / REPORT_FILE).read_text())
    assert report["is_official"] is False
    kinds = {kind["kind"]: kind for kind in report["kinds"]}
    assert kinds["word_embeddings"]["num_replaced"] == kinds["output_layer"]["num_replaced"] == 1
    assert describe(folder).quantized_embeddings == "int8"
    assert describe(folder).quantized_layers == {
        "query_key_value": 2, "dense": 2, "dense_h_to_4h": 2, "dense_4h_to_h": 2,
    }  # fmt: skip


def test_several_files(tmp_path: Path) -> None:
    folder = write(GOLDEN / "chatglm2", tmp_path / "out", max_shard_bytes=3_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    whole = write(GOLDEN / "chatglm2", tmp_path / "whole")
    assert torch.equal(logits(load_base(folder, device="cpu")), logits(load_base(whole, device="cpu")))


def test_a_head_tied_to_the_embedding_is_stored_once(tied: Path, tmp_path: Path) -> None:
    folder = write(tied, tmp_path / "out", "int4-g32")
    config = json.loads((folder / "config.json").read_text())
    assert set(config[LAYOUT_KEY]["outer_signs"]) == {"embedding"}
    stored = load_base(folder, device="cpu")
    made = load_base(tied, device="cpu", quantization="int4-g32", quantization_embeddings="int8")
    for model in (stored, made):
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert embedding.weight is head.weight
        assert embedding.weight_scale is head.weight_scale
    assert torch.equal(logits(stored), logits(made))
    exported = export(_job(folder, "transformers", tmp_path / "export"))
    again = load_base(exported.folder, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(again), logits(stored), atol=1e-5, rtol=0)


def _job(source: Path, form: str, folder: Path, **options: Any) -> ExportJob:
    given: dict[str, Any] = {"family": None, "prefix_path": None, "adapter_path": None}
    given |= {"dtype": torch.float32, "max_shard_bytes": 2**30, "overwrite": False} | options
    return ExportJob(source=str(source), format=form, output_dir=folder, **given)


def test_it_is_exported_as_the_weights_of_its_codes(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "out")
    stored = load_base(folder, dtype="float32", device="cpu")
    exported = export(_job(folder, "official", tmp_path / "export"))
    again = load_base(exported.folder, dtype="float32", device="cpu")
    assert again.quantization is None
    config = json.loads((exported.folder / "config.json").read_text())
    assert not {LAYOUT_KEY, "quantization_config", "quantization_bit"} & set(config)
    torch.testing.assert_close(logits(again), logits(stored), atol=1e-5, rtol=0)
    dequantize_model(stored)
    assert torch.equal(again.get_output_embeddings().weight, stored.get_output_embeddings().weight)


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_a_prefix_trains_over_it_as_over_its_weights(name: str, tmp_path: Path) -> None:
    """The head has no gradient, and passes that of its input on."""
    folder = write(GOLDEN / name, tmp_path / "out")
    gradients, losses = [], []
    for way in ("codes", "products", "weights"):
        model: Any = load_base(folder, dtype="float32", device="cpu")
        if way == "weights":
            dequantize_model(model)
        elif way == "products":
            prepare_for_training(model)
        torch.manual_seed(0)
        encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
        torch.nn.init.normal_(encoder.embedding.weight, std=0.5)
        attach_prefix(model, encoder)
        freeze_base(model)
        model.train()
        labels = ids(model).clone()
        labels[:, :9] = -100
        loss = model(input_ids=ids(model), labels=labels, labelled_only=True, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(encoder.embedding.weight.grad)
        assert all(weight.grad is None for weight in model.get_output_embeddings().parameters())
    for loss, gradient in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, gradients[-1], atol=1e-6, rtol=1e-3)
        assert gradient.abs().max() > 0


def test_a_prefix_of_it_fits_where_it_is_rounded_on_loading_and_back(tiny_base: Path, tmp_path: Path) -> None:
    folder = write(tiny_base, tmp_path / "out", "int4-g32")
    rounded: dict[str, Any] = {"quantization": "int4-g32", "quantization_embeddings": "int8", "device": "cpu"}
    for number, (source, options) in enumerate(
        ((folder, {"device": "cpu"}), (tiny_base, rounded), (tiny_base, {"device": "cpu"}))
    ):
        base = load_base(source, **options)
        meta = PrefixMeta(base_fingerprint=base.fingerprint(), base_source="the release", template="chatglm2")
        encoder = PrefixEncoder(prefix_shape(base.config), pre_seq_len=4)
        file = save_prefix(encoder, tmp_path / str(number), meta=meta)
        load_model(folder, prefix=file, device="cpu")
        load_model(tiny_base, prefix=file, **rounded)
        export(_job(folder, "official", tmp_path / f"export-{number}", prefix_path=str(file)))
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_prefix(tmp_path / "0", load_base(tiny_base, device="cpu"))


def test_what_cannot_be_is_refused(oracles: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"only ChatGLM-6B has an official format.*Use `int8`"):
        quantize_checkpoint(QuantizeJob(str(GOLDEN / "chatglm2"), "int4", tmp_path / "x", embeddings=True))
    folder = write(GOLDEN / "chatglm2", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"quantized already \(int4-e8\)"):
        write(folder, tmp_path / "again")
    config = json.loads((folder / "config.json").read_text())
    (folder / "manifest.json").unlink(missing_ok=True)

    def changed(**values: Any) -> None:
        content = config | {LAYOUT_KEY: config[LAYOUT_KEY] | values}
        (folder / "config.json").write_text(json.dumps(content))

    from glmtune.models.load import load_config

    changed(embeddings="int2")
    with pytest.raises(CheckpointError, match=r"glmtune_quantization is .*but must be"):
        load_config(folder, folder)
    changed(outer_signs={"embedding": "7:AAAA", "head": "!"})
    with pytest.raises(CheckpointError, match="outer_signs of glmtune_quantization cannot be read"):
        load_base(folder, device="cpu", verify_checksums=False)


def test_layouts_of_before_are_written_as_before() -> None:
    layout = QuantizedLayout(4, 32, method="int4-g32")
    assert "outer_signs" not in layout.plain()
    assert QuantizedLayout.from_plain(layout.plain()) == layout
    rounded = QuantizedLayout(4, 32, embeddings="int8", method="int4-g32", outer_signs={"head": "1:gA=="})
    assert QuantizedLayout.from_plain(json.loads(json.dumps(rounded.plain()))) == rounded
    assert rounded.identity == layout.identity
    assert hash(rounded)


def test_signs_are_packed_and_unpacked() -> None:
    torch.manual_seed(1)
    for count in (0, 1, 7, 8, 9, 4099):
        signs = bytes(torch.randint(0, 2, (count,), dtype=torch.uint8).tolist())
        assert unpacked_signs(packed_signs(signs)) == signs
    for text in ("", "3", "x:gA==", "9:gA==", "8:g", "8:gA==="):
        with pytest.raises(CheckpointError, match="outer_signs"):
            unpacked_signs(text)
