"""Memory of devices of every kind, by what their modules of PyTorch answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmtune import memory
from glmtune.inference.engine.budget import USABLE_FRAC, bytes_per_token, tokens_that_fit
from glmtune.models.devices import list_devices
from glmtune.models.load import load_config
from glmtune.models.releases.source import resolve_source
from glmtune.prefix.encoder import prefix_shape

GIB = 2**30


def backend(**more: Any) -> SimpleNamespace:
    """Return what PyTorch has for an accelerator: two devices, of which the second has twice as much."""
    emptied: list[bool] = []
    return SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda device: ((device.index + 1) * 3 * GIB, (device.index + 1) * 8 * GIB),
        get_device_properties=lambda index: SimpleNamespace(total_memory=(index + 1) * 8 * GIB),
        get_device_name=lambda index: f"Maker {index}",
        max_memory_allocated=lambda device: (device.index + 1) * GIB,
        memory_reserved=lambda device: 2 * GIB,
        synchronize=lambda: emptied.append(False),
        empty_cache=lambda: emptied.append(True),
        emptied=emptied,
        **more,
    )


@pytest.mark.parametrize("kind", ["cuda", "npu", "xpu"])
def test_devices_with_memory_of_their_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = backend()
    monkeypatch.setattr(torch, kind, module, raising=False)
    second = SimpleNamespace(type=kind, index=1)  # PyTorch makes no `npu` device without its extension
    assert memory.free_bytes(second) == 6 * GIB
    assert memory.total_bytes(second) == 16 * GIB
    assert memory.peak_bytes(second) == 2 * GIB
    assert memory.device_name(second) == "Maker 1"
    memory.release_memory()
    memory.synchronize(second)
    assert module.emptied == [True, False]


def test_an_xpu_that_does_not_tell_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(device: Any) -> Any:
        raise RuntimeError("The device doesn't support querying its available free memory.")

    module = backend()
    module.mem_get_info = unknown
    monkeypatch.setattr(torch, "xpu", module)
    assert memory.free_bytes(torch.device("xpu", 0)) == 6 * GIB


def test_mps_shares_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [GIB]
    module = SimpleNamespace(
        recommended_max_memory=lambda: 12 * GIB,
        driver_allocated_memory=lambda: held[0],
        synchronize=lambda: None,
        empty_cache=lambda: held.clear(),
    )
    monkeypatch.setattr(torch, "mps", module)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=30 * GIB))
    device = torch.device("mps")
    assert memory.free_bytes(device) == 11 * GIB
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * GIB))
    assert memory.free_bytes(device) == 2 * GIB
    assert (memory.total_bytes(device), memory.peak_bytes(device)) == (12 * GIB, GIB)
    assert memory.device_name(device) == "MPS"
    memory.release_memory()
    assert not held


def test_the_cpu_is_the_machine() -> None:
    device = torch.device("cpu")
    assert 0 < memory.free_bytes(device) <= memory.total_bytes(device)
    assert 0 < memory.peak_bytes(device) < memory.total_bytes(device)
    assert memory.device_name(device) == "CPU"


def test_the_engine_counts_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "xpu", backend())
    folder = resolve_source("glm-tiny")
    config = load_config(folder, folder)
    width = bytes_per_token(config, "plain", torch.float16)
    assert width == prefix_shape(config).kv_width * 2
    first, second = torch.device("xpu", 0), torch.device("xpu", 1)
    assert tokens_that_fit(width, [second] * 4) == int(USABLE_FRAC * 6 * GIB / width)
    # 3 GiB are free on the first device, which has three layers of four.
    assert tokens_that_fit(width, [first, first, first, second]) == int(USABLE_FRAC * 4 * GIB / width)


def test_all_accelerators_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("cuda", "xpu", "npu"):
        monkeypatch.setattr(torch, kind, SimpleNamespace(is_available=lambda: False), raising=False)
    monkeypatch.setattr(torch, "xpu", backend())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert list(map(str, list_devices())) == ["xpu:0", "xpu:1"]
