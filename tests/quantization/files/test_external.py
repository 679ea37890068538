"""Methods of other libraries: settings, refusals, and what can be loaded without a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.cli import main
from glmtune.errors import ConfigError
from glmtune.loading import load_base, load_model
from glmtune.quantization.arithmetic.methods import EXTERNAL, METHODS, method_named
from glmtune.quantization.files import external


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def test_names_do_not_clash_and_bits_are_stated() -> None:
    assert not EXTERNAL.keys() & METHODS.keys()
    for method in EXTERNAL.values():
        assert method.bits < method.bits_per_weight < method.bits + 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("method", ["nf4", "torchao-int4"])
def test_without_a_gpu(method: str, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=rf"`quantization` is `{method}`.*CUDA GPUs only.*`cpu`.*int4-g64"):
        load_model(tiny_base, quantization=method)
    assert main(["predict", f"model={tiny_base}", f"quantization={method}", "data=ads"]) == 2
    assert "CUDA GPUs only" in capsys.readouterr().err


@pytest.mark.parametrize("method", EXTERNAL)
def test_without_the_library(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"needs the package `{EXTERNAL[method].library}`.*pip install"):
        external.check_external(method, torch.device("cuda"))


def test_nothing_is_written_with_them() -> None:
    with pytest.raises(
        ConfigError, match=r"`quantization` is `nf4`, which bitsandbytes applies.*cannot be written"
    ):
        method_named("nf4")
    assert main(["quantize", "quantization.method=torchao-int4"]) == 2
    assert main(["train", "+recipe=full", "quantization=nf4"]) == 2


def test_what_transformers_is_told() -> None:
    config = external.quantizer_config("nf4", torch.bfloat16)
    assert config.load_in_4bit
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert config.bnb_4bit_use_double_quant


@needs("torchao")
def test_torchao_configs() -> None:
    four = external.quantizer_config("torchao-int4", torch.bfloat16).quant_type
    assert (type(four).__name__, four.group_size) == ("Int4WeightOnlyConfig", 128)
    # Not torchao's default format, which needs a further package.
    assert getattr(four, "int4_packing_format", "tile_packed_to_4d") == "tile_packed_to_4d"
    eight = external.quantizer_config("torchao-int8", torch.bfloat16).quant_type
    assert type(eight).__name__ == "Int8WeightOnlyConfig"


@needs("torchao")
@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_torchao_int8_loads_and_computes(generation: str, oracles: Path) -> None:
    source = oracles / generation / "checkpoint_bin"
    plain, model, ours = (loaded(source, quantization=method) for method in (None, "torchao-int8", "int8"))
    assert model.quantization == "torchao-int8"
    assert model.is_base(plain.fingerprint())
    assert model.fingerprint() != plain.fingerprint()
    ids = torch.arange(6, 26)[None]
    if generation == "v1":
        ids[0, 16:18] = torch.tensor([plain.config.gmask_token_id, plain.config.bos_token_id])
    with torch.no_grad():
        expected, found, own = (each(input_ids=ids, use_cache=False).logits for each in (plain, model, ours))
    assert 0 < (found - expected).square().mean() < 1.5 * (own - expected).square().mean()


@needs("bitsandbytes")
@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_nf4_weights_are_the_right_ones(
    generation: str, oracles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are for GPUs; that every weight arrived, as precise as NF4 is, can be seen on a CPU.

    Weights are dequantized as one row: bitsandbytes' loop for CPUs begins a block of 64 anew with every row, while
    its quantizer (and its GPU kernels) lets blocks run on, so other widths than multiples of 64 lose 6 dB and more.
    """
    from bitsandbytes.functional import dequantize_4bit

    monkeypatch.setitem(EXTERNAL, "nf4", dataclasses.replace(EXTERNAL["nf4"], needs_gpu=False))
    source = oracles / generation / "checkpoint_bin"
    plain, model = loaded(source), loaded(source, quantization="nf4")
    num_checked = 0
    for name, parameter in model.named_parameters():
        expected = plain.get_parameter(name)
        if type(parameter).__name__ == "Params4bit":
            parameter.quant_state.shape = torch.Size([expected.numel()])
            found = dequantize_4bit(parameter.data, parameter.quant_state).reshape(expected.shape)
            noise = (found - expected).square().sum()
            assert 10 * torch.log10(expected.square().sum() / noise) > 19.5  # dB; 20.7 for normal weights
            num_checked += 1
        else:
            assert torch.equal(parameter, expected)
    assert num_checked == sum(
        "layers" in name and value.dim() == 2 for name, value in plain.named_parameters()
    )


def loaded(source: Path, quantization: str | None = None) -> Any:
    return load_base(source, dtype="float32", device="cpu", quantization=quantization)
