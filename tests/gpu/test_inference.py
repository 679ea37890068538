"""Generation on a GPU equals that on the CPU: INT4, the request engine, compiled decoding, other libraries' codes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_model import Shape, random_model
from glmtune.inference.engine.engine import Engine
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.loading import load_base, load_model
from glmtune.models.architectures import compiling
from glmtune.quantization.arithmetic.methods import EXTERNAL
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from tests.gpu.devices import on_every_device

PROMPTS = [[5, 9, 13, 7, 11], [8, 6], [12, 14, 20, 21, 9, 10, 6]]
NEW = 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 8e-3}
"""Of the largest logit."""


def logits(model: Any) -> torch.Tensor:
    ids_BS = torch.tensor([PROMPTS[2]], device=model.device)
    with torch.inference_mode():
        return model(input_ids=ids_BS, use_cache=False).logits.float().cpu()


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= limit


def greedy(model: Any, prompt: list[int], **how: Any) -> list[int]:
    ids_1S = torch.tensor([prompt], device=model.device)
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **how}
    return model.generate(ids_1S, **settings)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def wide_base(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose widths the groups of every library divide."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide") / "chatglm2-wide"
    shape = Shape(layers=1, hidden=256, ffn=512, vocab=640, heads=8, positions=256)
    model = random_model(shape, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


@on_every_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16", "float16"])
def test_weights_in_every_type(device: str, dtype: torch.dtype, tiny_base: Path) -> None:
    expected = logits(load_base(tiny_base, device="cpu", dtype="float32"))
    assert_near(logits(load_base(tiny_base, device=device, dtype=dtype)), expected, dtype)


@on_every_device
@pytest.mark.parametrize("method", ["int4", "int8", "int4-g32"])
def test_codes_load_and_compute(device: str, method: str, wide_base: Path) -> None:
    """On the GPU the products are Triton's where it is installed; they equal the plain path on the CPU."""
    plain = load_base(wide_base, device="cpu", dtype="float32", quantization=method)
    model: Any = load_model(wide_base, device=device, dtype="bfloat16", quantization=method)
    assert model.device.type == device
    assert_near(logits(model), logits(plain), torch.bfloat16)
    used = prepare_for_inference(model)
    assert sum(used.values()) == 6
    if device == "cuda" and importlib.util.find_spec("triton"):
        assert set(used) == {"triton"}, "the log says why (INFO)"


@on_every_device
def test_stored_codes_load(device: str, wide_base: Path, tmp_path: Path) -> None:
    load_base(wide_base, device="cpu", quantization="int4").save_pretrained(tmp_path / "chatglm2-int4")
    expected: Any = load_base(wide_base, device="cpu", dtype="bfloat16", quantization="int4")
    model: Any = load_base(tmp_path / "chatglm2-int4", device=device, dtype="bfloat16")
    assert model.quantization == "int4"
    assert model.fingerprint() == expected.fingerprint()
    assert_near(logits(model), logits(expected), torch.bfloat16)


@on_every_device
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_the_engine_answers_as_the_cpu_does(device: str, quantization: str | None, wide_base: Path) -> None:
    """In float32, as rounding would choose other tokens; five requests, so that rows join and leave."""
    plain = load_base(wide_base, device="cpu", dtype="float32", quantization=quantization)
    model = load_base(wide_base, device=device, dtype="float32", quantization=quantization)
    prepare_for_inference(model)
    prompts = [*PROMPTS, [30, 31], [40, 41, 42]]
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True)
    with Engine(model) as engine:
        running = [engine.submit(Request(prompt_ids=tuple(prompt), sampling=sampling)) for prompt in prompts]
        found = [[token for piece in each for token in piece.token_ids] for each in running]
    assert found == [greedy(plain, prompt) for prompt in prompts]


@on_every_device
def test_decoding_compiled(device: str, wide_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":  # traced, not compiled: the compiler for CPUs takes a minute
        monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    model: Any = load_base(wide_base, device=device, dtype="float32")
    expected = greedy(model, PROMPTS[0])
    assert greedy(model, PROMPTS[0], **compiling.compiled_generation(torch.device(device))) == expected


@on_every_device
@pytest.mark.parametrize("method", EXTERNAL)
def test_codes_of_other_libraries(device: str, method: str, wide_base: Path) -> None:
    if importlib.util.find_spec(EXTERNAL[method].library) is None:
        pytest.skip(f"{EXTERNAL[method].library} is not installed")
    if device == "cpu" and EXTERNAL[method].needs_gpu:
        pytest.skip(f"{method} is for GPUs")
    plain = logits(load_base(wide_base, device="cpu", dtype="bfloat16"))
    found = logits(load_base(wide_base, device=device, dtype="bfloat16", quantization=method))
    noise = (found - plain).square().mean() / plain.square().mean()
    assert 1e-7 < float(noise) < (0.05 if EXTERNAL[method].bits == 4 else 0.002)
