"""Embedding and head as INT8 codes: of any command that answers, in the numbers of the codes, and of no checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from evaluation.backends.glm import load_backend
from evaluation.compare.settings import SideSettings
from glmtune.errors import ConfigError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.loading import load_model
from glmtune.models.settings import ModelSettings
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels.native import native_library
from glmtune.quantization.layers.embeddings import round_embeddings
from glmtune.quantization.layers.linear import QuantizedEmbedding, QuantizedLinear
from glmtune.training.distributed.deepspeed_settings import DeepSpeedSettings
from recipes.train import TrainConfig
from tests.inference.engine.cases import shared_prompts
from tests.inference.engine.requests import alone

ROUNDED = ModelSettings(quantization="int4", quantization_embeddings="int8", dtype="bfloat16", device="cpu")
IDS = torch.tensor([[5, 17, 300, 42, 9]])


def test_embedding_and_head_are_their_codes():
    plain = load_model("glm-tiny", dtype="float32", device="cpu")
    found = load_model("glm-tiny", dtype="float32", device="cpu", quantization_embeddings="int8")
    embedding, head = found.get_input_embeddings(), found.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    for codes, weight in (
        (embedding, plain.get_input_embeddings().weight),
        (head, plain.get_output_embeddings().weight),
    ):
        step_O1 = weight.abs().amax(dim=1, keepdim=True) / 127
        # Half a step, and what a scale in float16 is off at the largest codes.
        assert ((codes.dequantized() - weight).abs() <= 0.6 * step_O1).all()
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(embedding.dequantized())
        plain.get_output_embeddings().weight.copy_(head.dequantized())
        assert torch.allclose(found(IDS).logits, plain(IDS).logits, atol=1e-4)
    size = sum(weight.nbytes for part in (embedding, head) for weight in part.stored().values())
    before = sum(plain.get_parameter(n).nbytes for n in ("model.embed_tokens.weight", "lm_head.weight"))
    assert size < 0.27 * before  # a byte in place of four, and a scale per row


@pytest.mark.parametrize("name", ["v1", "v2", "glm4"])
def test_every_generation(name, oracles: Path):
    """ChatGLM-6B's head is its embedding, and stays it."""
    folder = oracles / name / "checkpoint_safetensors"
    plain = load_model(folder, dtype="float32", device="cpu")
    model = load_model(folder, dtype="float32", device="cpu", quantization_embeddings="int8")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert model.dtype == torch.float32
    if plain.get_input_embeddings().weight is plain.get_output_embeddings().weight:
        assert embedding.stored_codes() is head.stored_codes()
    else:
        assert not torch.equal(embedding.stored_codes(), head.stored_codes())
    assert model.fingerprint() == plain.fingerprint()  # a prefix or adapter of the one fits the other
    with torch.no_grad():
        ids = torch.tensor([shared_prompts(plain.config)[0]])
        logits, expected = model(ids).logits, plain(ids).logits
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_it_computes_in_the_type_that_it_had_and_answers():
    model = load_model(
        "glm-tiny", quantization="int4", dtype="bfloat16", device="cpu", quantization_embeddings="int8"
    )
    assert model.dtype == torch.bfloat16
    engine = Engine(model)
    assert engine._model.dtype == torch.bfloat16
    request = Request(prompt_ids=(5, 17, 300, 42), sampling=Sampling(max_new_tokens=8, ignore_eos=True))
    assert len(alone(engine, request).token_ids) == 8


@pytest.mark.skipif(bool(native_library().refusal), reason=native_library().refusal or "-")
def test_the_inputs_of_the_head_are_not_rounded():
    model = load_model("glm-tiny", quantization="int4", dtype="bfloat16", device="cpu")
    used = prepare_for_inference(model, activations="int8", embeddings="int8")
    assert used["native"] == 1
    assert used["native-a8"] == 36  # six layers of six blocks
    codes = model.get_output_embeddings()
    round_embeddings(model)  # they are so already
    assert model.get_output_embeddings() is codes


def test_codes_of_another_width_are_left(oracles: Path):
    with pytest.raises(
        ConfigError, match=r"`quantization_embeddings` is `int8`, but .* codes of 4 bits already"
    ):
        load_model(oracles / "v1" / "int4_embeddings", device="cpu", quantization_embeddings="int8")


def test_it_is_not_saved_beside_blocks_in_floating_point(tmp_path: Path):
    model = load_model("glm-tiny", device="cpu", quantization_embeddings="int8")
    with pytest.raises(
        ConfigError, match=r"rounded to INT8 in memory .*quantization_embeddings.*floating point"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_reach_the_model_and_are_named_in_results():
    backend = load_backend(ROUNDED)
    assert backend.identity.quantization == "int4-e8"
    plain = load_backend(dataclasses.replace(ROUNDED, quantization_embeddings=None))
    assert plain.identity.quantization == "int4"
    assert plain.identity.weights_hash != backend.identity.weights_hash  # the codes are part of it
    assert backend.weight_bytes < plain.weight_bytes
    side = SideSettings(quantization="int4-a8-e8").applied_to(ModelSettings())
    assert (side.method, side.quantization_activations, side.quantization_embeddings) == (
        "int4",
        "int8",
        "int8",
    )
    assert SideSettings(quantization="int4-e8").applied_to(ModelSettings()).quantization_activations is None
    assert SideSettings(quantization="bf16").applied_to(ROUNDED).quantization_embeddings is None


def test_wrong_values_and_uses_are_refused():
    with pytest.raises(ConfigError, match=r"`model.quantization_embeddings` is `int4`"):
        ModelSettings(quantization_embeddings="int4")
    with pytest.raises(ConfigError, match=r"`quantization_embeddings` is `int4`"):
        load_model("glm-tiny", quantization_embeddings="int4")
    rounded = dataclasses.replace(ROUNDED, quantization=None)
    with pytest.raises(ConfigError, match=r"`model.quantization_embeddings` is `int8`, but `tune` is `full`"):
        TrainConfig(model=rounded, tune="full", prefix=None)
    with pytest.raises(
        ConfigError, match=r"`fsdp`, but `model.quantization_embeddings` is `int8`, and codes"
    ):
        TrainConfig(model=rounded, distributed="fsdp")
    zero3 = DeepSpeedSettings(stage=3)
    with pytest.raises(ConfigError, match=r"\(stage 3\), but `model.quantization_embeddings` is .*zero2"):
        TrainConfig(model=rounded, deepspeed=zero3)
    config = TrainConfig(deepspeed=zero3)
    with pytest.raises(
        ConfigError, match=r"\(stage 3\), but `x` is quantized \(int4\), and DeepSpeed computes"
    ):
        config.check_division("`x` is quantized (int4)", has_outer_codes=True)
    config.check_division("`x` is quantized (int4)", has_outer_codes=False)  # codes of blocks alone are taken
