"""Official INT8 and INT4 checkpoints against the released code: bytes, scales, weights, logits, gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glmtune.loading import load_base
from glmtune.models.checkpoints.names import FusedLayout, name_table, official_tensor
from glmtune.models.checkpoints.writing import save_official
from glmtune.prefix.attach import attach_prefix, freeze_base
from glmtune.prefix.checkpoint import load_prefix
from glmtune.quantization.arithmetic.packing import unpack
from glmtune.quantization.layers.apply import quantize_model
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear
from tests.quantization.dequantized import dequantize_model

LOGITS, LOSS, GRADIENT = 1e-4, 2e-5, 1e-5
FOLDERS = ["v1/int8", "v1/int4", "v1/int4_embeddings", "v2/int8", "v2/int4"]
PAD = {"v1": 3, "v2": 0}


@dataclass
class Case:
    name: str
    folder: Path
    tensors: dict[str, Tensor]
    cases: dict[str, Any]

    @property
    def generation(self) -> str:
        return self.name.partition("/")[0]

    def load(self, **options: Any) -> Any:
        return load_base(self.folder, dtype="float32", device="cpu", **options)

    def inputs(self, case: str) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        return {name: self.tensors[key] for name in names if (key := f"{case}.{name}") in self.tensors}

    def stored(self) -> dict[str, Tensor]:
        return torch.load(self.folder / "pytorch_model.bin", weights_only=True)


@pytest.fixture(scope="module", params=FOLDERS)
def case(request: pytest.FixtureRequest, oracles: Path) -> Case:
    folder = oracles / request.param
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return Case(request.param, folder, load_file(folder / "cases.safetensors"), cases)


def official_state(model: Any) -> dict[str, Tensor]:
    state, layout = model.state_dict(), FusedLayout.of(model.config)
    return {entry.official: official_tensor(entry, state, layout) for entry in name_table(model.config)}


def assert_bytes(actual: dict[str, Tensor], case: Case) -> None:
    for name, expected in case.stored().items():
        if "inv_freq" in name:
            continue
        if expected.dtype == torch.int8 or name.endswith("weight_scale"):
            assert actual[name].dtype == expected.dtype
        assert torch.equal(actual[name].to(expected.dtype), expected), name


def test_bytes_and_scales_are_kept(case: Case) -> None:
    assert_bytes(official_state(case.load()), case)


def test_codes_and_dequantized_weights(case: Case) -> None:
    state = official_state(case.load())
    bits = 8 if "int8" in case.name else 4
    dequantized = case.load()
    dequantize_model(dequantized)
    floats = official_state(dequantized)
    outer = {"v1": "transformer.", "v2": "transformer.encoder."}[case.generation]
    checked = 0
    assert case.cases
    for name, described in case.cases.items():
        layer = outer + name.replace("layer0", "layers.0") + ".weight"
        if "int_weight" in described["tensors"]:
            codes = unpack(state[layer], bits=bits)
            assert torch.equal(codes.long(), case.tensors[f"{name}.int_weight"].long())
            checked += 1
        if "dequantized" in described["tensors"]:
            assert torch.equal(floats[layer], case.tensors[f"{name}.dequantized"])
            checked += 1
    assert checked >= 2


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_loss(case: Case, attention: str) -> None:
    model = case.load(attn_implementation=attention)
    for name in ("plain_b", "left_padded", "train_right_padded"):
        if name not in case.cases:
            continue
        inputs = case.inputs(name)
        output = model(**inputs, use_cache=False)
        key = next(key for key in case.tensors if key.startswith(f"{name}.logits"))
        expected = case.tensors[key]
        difference = (output.logits[: len(expected)] - expected).abs()
        if name == "left_padded":  # what padding sees, and the loss on it, is an accident of the release
            assert difference[inputs["input_ids"] != PAD[case.generation]].max() <= LOGITS
            continue
        assert difference.max() <= LOGITS
        torch.testing.assert_close(output.loss[None], case.tensors[f"{name}.loss"], atol=LOSS, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_logits_and_gradients(case: Case, checkpointing: bool, oracles: Path) -> None:
    if "prefix.gradient" not in case.cases:
        pytest.skip(f"{case.name} has no prefix cases")
    model = case.load()
    encoder = load_prefix(oracles / case.generation / "ptuning_embedding", model)
    encoder.dropout = 0.0
    attach_prefix(model, encoder)
    freeze_base(model)
    output = model(**case.inputs("prefix.plain_b"), use_cache=False)
    expected = case.tensors["prefix.plain_b.logits"]
    torch.testing.assert_close(output.logits, expected, atol=LOGITS, rtol=0)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**case.inputs("train_right_padded"), use_cache=False).loss
    torch.testing.assert_close(loss[None], case.tensors["prefix.gradient.loss"], atol=LOSS, rtol=0)
    loss.backward()
    expected = case.tensors["prefix.gradient.embedding"]
    found = model.base_model.prefix_encoder.embedding.weight.grad
    torch.testing.assert_close(found, expected, atol=GRADIENT * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("route", ["on loading", "in memory"])
def test_quantizing_makes_the_official_bytes(case: Case, route: str, oracles: Path) -> None:
    """What ``quantize(4|8)`` of the releases makes out of the half precision checkpoint."""
    source = oracles / case.generation / "checkpoint_bin"
    method = "int8" if "int8" in case.name else "int4"
    embeddings = case.name.endswith("embeddings")
    if route == "in memory":
        model = load_base(source, dtype="float16", device="cpu")
        quantize_model(model, method, embeddings=embeddings)
    elif embeddings:
        from glmtune.models.load import load_official
        from glmtune.quantization.files.quantize_on_load import QuantizingReader

        model = load_official(source, device="cpu", quantizer=QuantizingReader(method, embeddings=True))
    else:
        model = load_base(source, device="cpu", quantization=method)
    assert_bytes(official_state(model), case)


def test_written_checkpoints_are_the_official_ones(case: Case, tmp_path: Path) -> None:
    model = load_base(case.folder, dtype="float16", device="cpu")
    save_official(model, tmp_path)
    assert_bytes(load_file(tmp_path / "model.safetensors"), case)
    written = json.loads((tmp_path / "config.json").read_text())
    official = json.loads((case.folder / "config.json").read_text())
    for key in ("quantization_bit", "quantization_embeddings", "torch_dtype"):
        assert written.get(key) == official.get(key)
    again = load_base(tmp_path, dtype="float32", device="cpu")
    assert again.fingerprint() == model.fingerprint()
    assert again.fingerprint() != load_base(case.folder.parent / "checkpoint_bin").fingerprint()


def test_layers_of_codes_stand_where_the_release_has_them(case: Case) -> None:
    model = case.load()
    per_layer = 4 if case.generation == "v1" else 6  # query, key and value are apart in later generations
    head = int(case.name.endswith("embeddings"))
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 2 * per_layer + head
    embeddings = [module for module in model.modules() if isinstance(module, QuantizedEmbedding)]
    assert len(embeddings) == head
    if head:
        assert model.lm_head.weight is embeddings[0].weight
        assert model.lm_head.weight_scale is embeddings[0].weight_scale
    assert model.dtype == torch.float32
    assert isinstance(model.get_output_embeddings(), nn.Linear)
