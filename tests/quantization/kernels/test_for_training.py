"""Tuning over codes: gradients equal those of the dequantized model, in every generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glmtune.loading import load_base
from glmtune.prefix.attach import attach_prefix, freeze_base
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.quantization.kernels.for_training import prepare_for_training
from glmtune.quantization.kernels.native import native_library
from glmtune.quantization.layers.linear import QuantizedLinear
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings
from tests.quantization.dequantized import dequantize_model

METHODS = ("int8", "int4", "int4-g32", "int4-g32-asym")
"""Every layout of codes: by row, in groups, with zero points. What chooses the codes does not matter here."""
OFFICIAL = ("v1/int8", "v1/int4", "v1/int4_embeddings", "v2/int8", "v2/int4")


def pair(source: Path, method: str) -> tuple[Any, Any]:
    """A model of codes, and its dequantized twin."""
    model = load_base(source, dtype="float32", device="cpu", quantization=method)
    twin = copy.deepcopy(model)
    dequantize_model(twin)
    return model, twin


def batch(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(6, 22).reshape(2, 8)
    if hasattr(model.config, "gmask_token_id"):
        ids[:, 3:5] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any, inputs: dict[str, Tensor], autocast: bool) -> dict[str, Tensor]:
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], autocast: bool) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        tolerance = (0.1 if autocast else 1e-5) * float(gradient.abs().max()) + 1e-9
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=0)


def assert_lora_same(found: dict[str, Tensor], expected: dict[str, Tensor], autocast: bool) -> None:
    """As `assert_same`; under autocast by norms, as single numbers of LoRA's factors missed a tenth by a hair."""
    if not autocast:
        return assert_same(found, expected, autocast)
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-9, name
    return None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_prefix_gradients(source: Path, method: str, checkpointing: bool, autocast: bool) -> None:
    results = []
    for model in pair(source, method):
        torch.manual_seed(3)
        attach_prefix(model, PrefixEncoder(prefix_shape(model.config), pre_seq_len=4, dropout=0.0))
        freeze_base(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(model, batch(model), autocast))
    assert_same(*results, autocast)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_lora_gradients(source: Path, method: str, checkpointing: bool, autocast: bool) -> None:
    results = []
    for model in pair(source, method):
        torch.manual_seed(3)
        tuned = tune_adapter(model, LoraSettings(rank=2, dropout=0.0)).model
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        if checkpointing:
            tuned.gradient_checkpointing_enable({"use_reentrant": False})
            tuned.enable_input_require_grads()
        results.append(gradients(tuned, batch(model), autocast))
    assert_lora_same(*results, autocast)
    assert all("lora_" in name for name in results[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_product_of_training_changes_no_gradient(
    source: Path, method: str, checkpointing: bool, autocast: bool
) -> None:
    results = []
    for model in pair(source, method):
        torch.manual_seed(3)
        attach_prefix(model, PrefixEncoder(prefix_shape(model.config), pre_seq_len=4, dropout=0.0))
        freeze_base(model)
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        taken = prepare_for_training(model)
        assert taken == (0 if native_library().refusal else len(layers))
        assert all(layer.weight_scale.is_meta for layer in layers if taken)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(model, batch(model), autocast))
    assert_same(*results, autocast)


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_of_codes_stay_in_one_compiled_graph(source: Path, autocast: bool) -> None:
    """The native product is an operator: no graph breaks, one graph for layers of a kind, same gradients."""
    from torch._dynamo.testing import CompileCounter

    results = []
    for compiles in (False, True):
        model = load_base(source, dtype="float32", device="cpu", quantization="int4")
        mlps = [block.mlp for block in model.modules() if hasattr(block, "mlp")]
        counter = CompileCounter()
        if compiles:
            for mlp in mlps:
                mlp.compile(backend=counter, fullgraph=True)
        if not prepare_for_training(model):
            pytest.skip(f"no native kernels: {native_library().refusal}")
        x = torch.linspace(-1, 1, 2 * 3 * model.config.hidden_size).reshape(2, 3, -1).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = x
            for mlp in mlps:
                output = output + mlp(output)
        output.float().sin().sum().backward()
        assert x.grad is not None
        assert len(mlps) > 1
        assert counter.frame_count == int(compiles)
        results.append((output.detach(), x.grad))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=0, atol=0)


def test_weights_that_are_divided_between_processes_stay_on_the_plain_path(source: Path) -> None:
    model = load_base(source, dtype="float32", device="cpu", quantization="int4")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    layers[0].weight.ds_id = 0  # as DeepSpeed marks what ZeRO-3 divides
    taken = prepare_for_training(model)
    assert taken == (0 if native_library().refusal else len(layers) - 1)
    assert layers[0].product is None


@pytest.mark.parametrize("folder", OFFICIAL)
@pytest.mark.parametrize("tune", ["prefix", "lora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_over_released_files(folder: str, tune: str, autocast: bool, oracles: Path) -> None:
    """INT8 and INT4 as released, with gradient checkpointing, against their dequantized weights."""
    model = load_base(oracles / folder, dtype="float32", device="cpu")
    twin = copy.deepcopy(model)
    dequantize_model(twin)
    results = []
    for each in (model, twin):
        torch.manual_seed(3)
        if tune == "prefix":
            attach_prefix(each, PrefixEncoder(prefix_shape(each.config), pre_seq_len=4, dropout=0.0))
            freeze_base(each)
            tuned: Any = each
        else:
            tuned = tune_adapter(each, LoraSettings(rank=2, dropout=0.0)).model
            for name, weight in tuned.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.1)
            tuned.enable_input_require_grads()
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(tuned, batch(each), autocast))
    (assert_same if tune == "prefix" else assert_lora_same)(*results, autocast)


def test_lora_on_the_quantized_layers_themselves(source: Path) -> None:
    """Every linear layer of a block can carry an adapter, and its codes stay as they are."""
    model = load_base(source, dtype="float32", device="cpu", quantization="int4")
    names = {"dense_h_to_4h", "dense"} if source.name == "chatglm" else {"gate_up_proj", "o_proj"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = tune_adapter(model, LoraSettings(rank=2, targets=sorted(names))).model
    optimizer = torch.optim.AdamW([w for w in tuned.parameters() if w.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = tuned(**batch(model), use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
