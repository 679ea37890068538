"""`quantization_activations` from the settings of a command to the layers, refused where it would be ignored."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from evaluation.backends.glm import load_backend
from evaluation.compare.settings import SideSettings
from glmtune import load_model
from glmtune.errors import ConfigError
from glmtune.loading import load_base
from glmtune.models.settings import ACTIVATIONS, ModelSettings
from glmtune.quantization.kernels.dispatch import KERNELS, choose_kernel
from glmtune.quantization.layers.linear import QuantizedLinear
from glmtune.training.config import RunConfig
from recipes.compare import CompareConfig
from recipes.eval import EvalConfig

INT8 = ModelSettings(quantization="int4", quantization_activations="int8", device="cpu", dtype="bfloat16")


def test_the_choices_are_those_of_the_kernels() -> None:
    assert set(ACTIVATIONS) == {name for name in KERNELS if name is not None}
    with pytest.raises(ConfigError, match=r"`model.quantization_activations` is `int4`"):
        ModelSettings(quantization_activations="int4")


def test_load_model_rounds_or_refuses() -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "quantization_activations": "int8"}
    model = load_model("glm-tiny", quantization="int4", **options)
    assert all(layer.product for layer in model.modules() if isinstance(layer, QuantizedLinear))
    with pytest.raises(ConfigError, match="the model is not quantized"):
        load_model("glm-tiny", **options)


def test_load_model_gives_the_fastest_products() -> None:
    model = load_model("glm-tiny", device="cpu", dtype="bfloat16", quantization="int4")
    kernel = choose_kernel(load_codes(), torch.bfloat16)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert layers
    assert all((layer.product is None) == (kernel is None) for layer in layers)


def load_codes() -> QuantizedLinear:
    base = load_base("glm-tiny", device="cpu", dtype="bfloat16", quantization="int4")
    return next(layer for layer in base.modules() if isinstance(layer, QuantizedLinear))


def test_an_evaluation_says_that_activations_were_rounded() -> None:
    plain = dataclasses.replace(INT8, quantization_activations=None)
    rounded, exact = (load_backend(model).identity for model in (INT8, plain))
    assert (rounded.quantization, exact.quantization) == ("int4-a8", "int4")
    assert rounded.weights_hash == exact.weights_hash


def test_a_candidate_may_differ_in_it_alone() -> None:
    side = SideSettings(quantization_activations="int8")
    assert side.applied_to(ModelSettings(quantization="int4")).quantization_activations == "int8"
    rounded = SideSettings(quantization="int4-g32-a8").applied_to(ModelSettings())
    assert (rounded.method, rounded.quantization_activations) == ("int4-g32", "int8")
    assert SideSettings(quantization="bf16").applied_to(INT8).quantization_activations is None
    assert CompareConfig(candidate=side, model=ModelSettings(quantization="int4")).candidate_sides() == {
        "candidate": side
    }


def test_training_and_servers_refuse_it() -> None:
    with pytest.raises(ConfigError, match="`int8`, but training takes activations as they are"):
        RunConfig(model=INT8)
    with pytest.raises(ConfigError, match=r"`model.quantization_activations` is `int8`, but `backend` is"):
        EvalConfig(backend="openai", model=ModelSettings(quantization_activations="int8"))
