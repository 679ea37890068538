"""Devices that are not here are refused by name; `auto` takes the accelerators that are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmtune.errors import ConfigError
from glmtune.loading import load_base
from glmtune.models.devices import choose_device, choose_dtype
from glmtune.models.settings import ModelSettings
from glmtune.planning.hardware import detect_hardware, host_memory_bytes
from glmtune.training.arguments import compute_precision, training_arguments
from glmtune.training.distributed.deepspeed_engine import prepare
from glmtune.training.distributed.deepspeed_settings import DeepSpeedSettings
from glmtune.training.distributed.launch import LaunchSettings, num_processes
from glmtune.training.settings import TrainerSettings
from recipes import train


@pytest.mark.parametrize("kind", ["mps", "xpu", "npu", "cuda"])
def test_a_device_that_is_not_here(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, kind, SimpleNamespace(is_available=lambda: False), raising=False)
    assert ModelSettings(device=kind).device == kind
    with pytest.raises(
        ConfigError, match=rf"`model.device` is `{kind}`, but PyTorch sees 0 {kind.upper()} devices"
    ):
        choose_device(kind)


@pytest.mark.parametrize("given", ["gpu", "cuda:x", "tpu", "meta", "cpu:", "cuda:99999", ""])
def test_what_is_no_device(given: str) -> None:
    with pytest.raises(ConfigError, match=r"it must be auto, cpu, cuda"):
        choose_device(given)
    with pytest.raises(ConfigError, match=r"it must be auto, cpu, cuda"):
        ModelSettings(device=given)


def put_in(monkeypatch: pytest.MonkeyPatch, *kinds: str, bfloat16: bool = True) -> None:
    """Let PyTorch see one device of each of these kinds, and none of others."""
    for name in ("cuda", "xpu", "npu"):
        module = SimpleNamespace(
            is_available=lambda name=name: name in kinds,
            device_count=lambda: 1,
            is_bf16_supported=lambda: bfloat16,
        )
        monkeypatch.setattr(torch, name, module, raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: bfloat16)
    if "npu" in kinds:  # PyTorch knows the name only once Ascend's package has given it one
        monkeypatch.setattr(torch, "device", lambda kind, *_: SimpleNamespace(type=str(kind)))


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), "cpu"),
        (("mps",), "mps"),
        (("xpu", "mps"), "xpu"),
        (("npu", "xpu"), "npu"),
        (("cuda", "npu", "xpu"), "cuda"),
    ],
)
def test_auto(present: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, *present)
    assert choose_device("auto").type == choose_device(None).type == expected
    assert all(choose_device(kind).type == kind for kind in present)


@pytest.mark.parametrize(
    ("present", "expected"),
    [((), "cpu"), (("mps",), "cpu"), (("xpu", "mps"), "cpu"), (("npu",), "npu"), (("cuda", "npu"), "cuda")],
)
def test_what_trains_unasked(
    present: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Only where a run that is resumed draws the numbers that it would have drawn."""
    put_in(monkeypatch, *present)
    assert train._device("auto").type == expected
    said = capsys.readouterr().err
    if present and expected == "cpu":
        assert f"training runs on the CPU, as a run on {present[0].upper()} could not be resumed" in said
        assert f"Add `model.device={present[0]}`" in said
    else:
        assert not said
    assert all(train._device(kind).type == kind for kind in present)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mps", "xpu", "npu"])
def test_what_is_done_on_cuda_alone_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, kind)
    assert num_processes(LaunchSettings(), kind) == 1
    with pytest.raises(
        ConfigError, match=rf"CUDA GPUs or on the CPU only, and this run is on {kind.upper()}"
    ):
        num_processes(LaunchSettings(num_processes=2), kind)
    with pytest.raises(ConfigError, match=r"DeepSpeed runs on CUDA GPUs or on the CPU only"):
        prepare(DeepSpeedSettings(), kind)
    options = {"seed": 1, "device": kind, "autocast": "no", "evaluates": False}
    with pytest.raises(ConfigError, match=rf"a CUDA GPU and the host, but training runs on {kind.upper()}"):
        training_arguments(TrainerSettings(optim="paged_adamw_32bit"), output_dir=Path("x"), **options)


def test_precisions_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, "xpu", "mps")
    choose = partial(compute_precision, dtype=torch.float32, tune="full")
    assert choose(TrainerSettings(), device="xpu") == "bf16"
    assert choose(TrainerSettings(), device="mps") == "no"
    assert choose(TrainerSettings(precision="fp16"), device="xpu") == "fp16"
    with pytest.raises(ConfigError, match=r"needs a GPU and training runs on MPS"):
        choose(TrainerSettings(precision="fp16"), device="mps")


def test_plans_know_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, "xpu", "mps")
    size = SimpleNamespace(total_memory=2**33)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: size, raising=False)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    found = detect_hardware("xpu")
    assert (found.device, found.num_devices, found.device_bytes) == ("xpu", 1, 2**33)
    assert str(found).endswith("(detected, XPU, estimated like a CUDA GPU)")
    assert detect_hardware("auto").device == detect_hardware("mps").device == "cpu"
    assert detect_hardware("mps").device_bytes == host_memory_bytes()


@pytest.mark.parametrize("kind", ["mps", "xpu", "npu"])
def test_floating_types(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(type=kind)
    for bfloat16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        put_in(monkeypatch, kind, bfloat16=bfloat16)
        assert choose_dtype(None, device, stored="bfloat16", num_parameters=1) == expected
        assert choose_dtype("auto", device, stored="float16", num_parameters=1) == torch.float16
        assert choose_dtype("float32", device, stored="bfloat16", num_parameters=1) == torch.float32
    with pytest.raises(ConfigError, match=rf"`bfloat16`, but this {kind.upper()} device does not compute"):
        choose_dtype("bfloat16", device, stored="float16", num_parameters=1)


def test_a_model_is_not_moved_to_what_is_not_here(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base(tiny_base, device="cpu")
    put_in(monkeypatch)
    for move in (model.cuda, lambda: model.to("mps"), lambda: model.to("xpu", torch.float16)):
        with pytest.raises(
            ConfigError, match=r"PyTorch sees 0 (CUDA|MPS|XPU) devices here. Use `model.device=cpu"
        ):
            move()
    assert model.to(torch.float16).dtype == torch.float16


def test_settings_that_split() -> None:
    reading = {"verify_checksums": True}
    assert ModelSettings().where == {"device": "auto"} | reading
    assert ModelSettings(num_gpus=2).where == {"device_map": "auto", "num_gpus": 2} | reading
    split = {"device_map": "sequential", "num_gpus": None}
    assert ModelSettings(device_map="sequential").where == split | reading
    for values, words in (
        ({"device_map": "evenly"}, r"`model.device_map` is `evenly`"),
        ({"num_gpus": 0}, r"`model.num_gpus` is 0"),
        ({"device_map": "auto", "device": "cuda:1"}, r"`model.device` is `cuda:1`, and `model.device_map`"),
    ):
        with pytest.raises(ConfigError, match=words):
            ModelSettings(**values)
    with pytest.raises(ConfigError, match=r"training splits no model by layers: with `distributed=fsdp`"):
        train.TrainConfig(model=ModelSettings(num_gpus=2))
