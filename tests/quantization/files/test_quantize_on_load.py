"""Quantizing while reading, reading what is quantized, and refusing what is damaged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_base, load_model
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.load import load_official
from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.files.quantize_on_load import QuantizingReader
from glmtune.quantization.layers.apply import quantize_model
from tests.quantization.conftest import GOLDEN, REPO
from tests.quantization.dequantized import dequantize_model, logits

Spoil = Callable[..., Path]
LIMIT = 1.3


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.calibrated])
def test_on_reading_as_in_memory_as_saved(source: Path, method: str, tmp_path: Path) -> None:
    read = load_base(source, dtype="float32", device="cpu", quantization=method)
    plain = load_base(source, dtype="float16", device="cpu")  # the golden checkpoints are float16 or bfloat16
    plain_print = plain.fingerprint()
    if source.name == "glm4":
        plain = load_base(source, dtype="bfloat16", device="cpu")
    quantize_model(plain, method)
    assert torch.equal(logits(read), logits(plain.float()))
    assert read.fingerprint() == plain.fingerprint() != plain_print
    assert read.is_base(plain_print)
    read.save_pretrained(tmp_path)
    again = load_base(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(logits(again), logits(read))
    assert again.fingerprint() == read.fingerprint()
    assert again.is_base(plain_print)
    assert not again.is_base("0" * 64)
    layout = QuantizedLayout.of(again.config)
    assert layout is not None
    assert (layout.method, layout.is_official) == (method, not method.startswith("int4-g"))


def test_the_dequantized_model_gives_the_same_logits(source: Path) -> None:
    model = load_base(source, dtype="float32", device="cpu", quantization="int4-g32-asym")
    expected = logits(model)
    dequantize_model(model)
    assert not any(parameter.dtype == torch.int8 for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected)
    assert QuantizedLayout.of(model.config) is None


def test_quantized_embeddings_of_the_first_generation(tmp_path: Path) -> None:
    reader = QuantizingReader("int4", embeddings=True, measure=True)
    model = load_official(GOLDEN / "chatglm", dtype="float32", device="cpu", quantizer=reader)
    model.save_pretrained(tmp_path)
    again = load_base(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_embeddings"] is True
    assert model.lm_head.weight is model.get_input_embeddings().weight
    quantized = {layer.name for layer in reader.report.layers if layer.replaced}
    assert "transformer.word_embeddings" in quantized
    model.bfloat16()
    assert logits(model).dtype == torch.bfloat16
    dequantize_model(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_report_lists_every_layer(source: Path) -> None:
    reader = QuantizingReader("int4", skip=("layers.0.mlp.dense_4h_to_h",), measure=True)
    load_official(source, dtype="float32", device="cpu", quantizer=reader)
    report = reader.report
    memory = quantize_model(
        load_base(source, dtype="auto", device="cpu"), "int4", skip=("layers.0.mlp.dense_4h_to_h",)
    )
    assert [layer.name for layer in report.layers] == [layer.name for layer in memory.layers]
    reasons = {layer.kind: layer.reason for layer in report.layers if not layer.replaced}
    assert reasons["dense_4h_to_h"] == "named in `skip`"
    assert reasons["word_embeddings"] == "outside the blocks"
    skipped = [layer for layer in report.layers if layer.kind == "dense_4h_to_h" and not layer.replaced]
    assert len(skipped) == 1
    for layer in report.layers:
        assert (layer.sqnr_db is not None) == layer.replaced
        if layer.replaced:
            assert 10 < (layer.sqnr_db or 0) < 30
            assert layer.bits_per_weight == 4 + 16 / layer.shape[1]
        else:
            assert layer.bits_per_weight == 16
    kinds = {kind.kind: kind for kind in report.kinds()}
    assert kinds["dense_4h_to_h"].num_skipped == 1
    assert kinds["dense_4h_to_h"].worst.endswith("dense_4h_to_h")
    assert 4 < report.bits_per_weight < 16
    assert json.loads(json.dumps(report.as_dict()))["method"] == "int4"


def test_skipped_layers_are_left_and_stay_left(source: Path, tmp_path: Path) -> None:
    reader = QuantizingReader("int4", skip=("*.0.*", "dense"))
    model = load_official(source, dtype="float32", device="cpu", quantizer=reader)
    model.save_pretrained(tmp_path)
    assert "quantization_bit" not in json.loads((tmp_path / "config.json").read_text())
    again = load_base(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(logits(again), logits(model))
    report = reader.report
    assert not any(layer.replaced for layer in report.layers if ".0." in layer.name or layer.kind == "dense")


def test_settings_that_no_layer_can_obey() -> None:
    def load(**options: Any) -> None:
        load_official(GOLDEN / "chatglm2", device="cpu", quantizer=QuantizingReader(**options))

    with pytest.raises(ConfigError, match=r"`quantization` is `int4-g12`.*Did you mean"):
        load(method="int4-g12")
    with pytest.raises(ConfigError, match=r"`skip` names `dense_x`, but no linear layer.*query_key_value"):
        load(method="int4", skip=("dense_x",))
    with pytest.raises(ConfigError, match="only ChatGLM-6B has an official format for quantized embeddings"):
        load(method="int4", embeddings=True)


def test_an_odd_input_width_is_refused_by_name(tmp_path: Path) -> None:
    from glmtune.models.checkpoints.config import native_config
    from glmtune.models.load import build_model
    from glmtune.models.releases.families import Family

    official = json.loads((GOLDEN / "chatglm2" / "config.json").read_text()) | {"ffn_hidden_size": 37}
    build_model(native_config(official, Family.CHATGLM2)).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"`int4`.*layers\.0\.mlp\.dense_4h_to_h has 37 input columns.*`int8`"
    ):
        load_base(tmp_path, device="cpu", quantization="int4")
    reader = QuantizingReader("int4", skip=("dense_4h_to_h",))
    load_official(tmp_path, device="cpu", quantizer=reader)
    load_base(tmp_path, device="cpu", quantization="int8")
    (tmp_path / "config.json").write_text(json.dumps(official | {"quantization_bit": 4}))
    with pytest.raises(CheckpointError, match=r"37 input columns, and 4 bits need an even number"):
        load_base(tmp_path, device="cpu")


def test_another_quantization_than_the_stored_one_is_refused(oracles: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`quantization` is `int8`, but the checkpoint is stored as `int4`"
    ):
        load_model(oracles / "v2" / "int4", quantization="int8")
    same = load_model(oracles / "v2" / "int4", quantization="int4", device="cpu")
    assert torch.equal(logits(same), logits(load_model(oracles / "v2" / "int4", device="cpu")))
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_model(same, "int8")


def _set(name: str, index: Any, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[next(key for key in tensors if key.endswith(name))][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("query_key_value.weight_scale", 3, float("nan")),
            r"query_key_value\.weight_scale, read as .* not finite",
        ),
        (
            _set("query_key_value.weight_scale", 3, float("inf")),
            r"query_key_value\.weight_scale.* not finite",
        ),
        (
            _set("dense.weight_scale", slice(None), 0.0),
            r"must be finite, and positive.*dense\.weight_scale: .* rows have a zero scale but codes.*fetch",
        ),
        (
            _set("dense.weight_scale", 0, -0.01),
            r"must be finite, and positive.*dense\.weight_scale: 1 of \d+ are negative.*fetch",
        ),
    ],
)
@pytest.mark.parametrize("name", ["v1/int4", "v2/int8", "v1/int4_embeddings"])
def test_corrupt_scales(change: Any, message: str, name: str, oracles: Path, spoil: Spoil) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s){message}"):
        load_base(spoil(oracles / name, change), device="cpu")


def test_a_zero_scale_of_a_row_of_zeros_is_fine(oracles: Path, spoil: Spoil) -> None:
    def empty_row(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith("dense.weight_scale"))
        tensors[key][2] = 0
        tensors[key.removesuffix("_scale")][2] = 0

    model = load_base(spoil(oracles / "v2" / "int4", empty_row), device="cpu")
    assert torch.isfinite(logits(model)).all()


def _reshape(name: str, columns: int | None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith(name))
        value = tensors[key]
        tensors[key] = value[:-1] if columns is None else value[:, :columns]

    return change


def test_scales_of_another_shape(oracles: Path, spoil: Spoil) -> None:
    folder = spoil(oracles / "v2" / "int4", _reshape("mlp.dense_4h_to_h.weight_scale", None))
    with pytest.raises(CheckpointError, match=r"dense_4h_to_h\.weight_scale is \[63\] in .* asks for \[64\]"):
        load_base(folder)


def test_wrong_byte_counts(oracles: Path, spoil: Spoil) -> None:
    folder = spoil(oracles / "v2" / "int4", _reshape("mlp.dense_4h_to_h.weight", 39))
    with pytest.raises(
        CheckpointError, match=r"(?s)dense_4h_to_h\.weight is \[64, 39\].* asks for \[64, 40\].*4 bits"
    ):
        load_base(folder)


@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_a_bit_width_that_is_not_that_of_the_file(generation: str, oracles: Path, spoil: Spoil) -> None:
    folder = spoil(oracles / generation / "int4", lambda _: None, {"quantization_bit": 8})
    with pytest.raises(
        CheckpointError, match=r"(?s)of another shape.*says 8 bits per weight; the bytes of a row do not"
    ):
        load_base(folder)
    folder = spoil(oracles / generation / "int8", lambda _: None, {"quantization_bit": 4})
    with pytest.raises(CheckpointError, match=r"(?s)of another shape.*says 4 bits per weight"):
        load_base(folder)
    folder = spoil(oracles / generation / "int8", lambda _: None, {"quantization_bit": None})
    with pytest.raises(
        CheckpointError, match=r"(?s)leftover.*are quantized, but config\.json has no quantization_bit"
    ):
        load_base(folder)
    folder = spoil(
        GOLDEN / {"v1": "chatglm", "v2": "chatglm2"}[generation], lambda _: None, {"quantization_bit": 8}
    )
    with pytest.raises(CheckpointError, match=r"(?s)must hold codes of type int8.*not quantized: remove"):
        load_base(folder)


def test_missing_scales_are_named(oracles: Path, spoil: Spoil) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[next(key for key in tensors if key.endswith("dense.weight_scale"))]

    with pytest.raises(CheckpointError, match=r"1 missing: .*dense\.weight_scale"):
        load_base(spoil(oracles / "v1" / "int8", drop))


def test_weights_that_are_not_finite_are_not_quantized(spoil: Spoil) -> None:
    for value in (float("nan"), float("inf")):
        folder = spoil(GOLDEN / "chatglm2", _set("layers.1.mlp.dense_4h_to_h.weight", (3, 5), value))
        for method in ("int4", "int4-g32", "int8"):
            with pytest.raises(
                CheckpointError, match=r"layers\.1\.mlp\.dense_4h_to_h cannot be quantized.*not finite"
            ):
                load_base(folder, device="cpu", quantization=method)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_quantizing_on_loading(tmp_path: Path) -> None:
    maker = importlib.util.spec_from_file_location(
        "make_checkpoint", REPO / "benchmarks" / "make_checkpoint.py"
    )
    assert maker is not None
    assert maker.loader is not None
    module = importlib.util.module_from_spec(maker)
    maker.loader.exec_module(module)
    shape = ["--layers=12", "--hidden=1024", "--ffn=2736", "--heads=8", "--kv-heads=2", "--vocab=8192"]
    files = [f"--out={tmp_path}", "--format=bin", "--dtype=float16", "--shard-bytes=100000000"]
    module.write(module.parse_arguments(shape + files))
    command = [sys.executable, str(REPO / "benchmarks" / "quantized_load_memory.py"), str(tmp_path)]
    command += ["--quantization", "int4", "int8", "--warm-up", str(GOLDEN / "glm4")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    results = [json.loads(line) for line in output.splitlines()]
    assert len(results) == 2
    for result in results:
        assert result["quantized_bytes"] > 80e6
        assert result["ratio"] <= LIMIT, result
