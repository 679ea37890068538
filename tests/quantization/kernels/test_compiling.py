"""What the kernels are compiled for, and what runs where they cannot be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from glmtune.quantization.arithmetic.primitives import round_activations
from glmtune.quantization.kernels import native
from glmtune.quantization.kernels.dispatch import choose_kernel, prepare_for_inference
from glmtune.quantization.kernels.native import SWITCH, native_library
from tests.quantization.kernels.test_native import assert_equal_but_for_rounding, layer


class TestWhereNothingCanBeCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path))
        monkeypatch.setenv(SWITCH, "1")
        native_library.cache_clear()
        yield
        native_library.cache_clear()

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert "no C++ compiler found" in native_library().refusal
        kernel = choose_kernel(layer("int4", 16), torch.bfloat16)
        assert kernel is not None
        assert kernel.name == "int4pack"

    def test_a_compiler_that_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        compiler = tmp_path / "broken"
        compiler.write_text("#!/bin/sh\necho 'fatal: no space' >&2\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert native_library().refusal == "compiling them failed: fatal: no space"
        assert len(caplog.records) == 1
        assert not list(tmp_path.glob("*.so"))

    def test_the_switch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SWITCH, "0")
        assert native_library().refusal == f"{SWITCH} is 0"

    def test_a_value_that_the_switch_has_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SWITCH, "avx3")
        assert native_library().refusal == f"{SWITCH} is 'avx3', not 1, 0, avx2 or avx2-vnni"

    def test_another_processor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cpuinfo").write_text("flags : fpu avx avx2\n")
        monkeypatch.setattr(native, "CPU_INFO", tmp_path / "cpuinfo")
        assert native_library().refusal == "the processor has neither AVX-512 nor AVX2"

    def test_less_than_the_switch_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cpuinfo").write_text("flags : avx2 fma f16c\n")
        monkeypatch.setattr(native, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setenv(SWITCH, "avx2-vnni")
        assert native_library().refusal == f"the processor has not what {SWITCH}=avx2-vnni names"

    def test_rounded_activations_take_the_plain_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SWITCH, "0")
        made = layer("int4-g64")
        x = torch.randn(3, 256)
        weight = made.dequantized(torch.float64)
        assert prepare_for_inference(made, torch.float32, activations="int8") == {"plain-a8": 1}
        assert_equal_but_for_rounding(made(x), round_activations(x, block=64).double() @ weight.T)


HAS = {
    "avx512": "avx2 fma f16c avx512f avx512bw avx512vl",
    "avx2": "avx2 fma f16c",
    # A processor whose AVX-512 lacks 16-bit numbers: Xeon Phi.
    "a part": "avx2 fma f16c avx512f avx512cd",
}


@pytest.mark.parametrize("has", list(HAS))
@pytest.mark.parametrize("switch", ["1", "avx2"])
def test_it_is_compiled_for_this_processor_or_the_one_named(
    has: str, switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {HAS[has]} amx_bf16\n")
    monkeypatch.setattr(native, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native.sys, "platform", "linux")
    monkeypatch.setenv(SWITCH, switch)
    monkeypatch.setenv("CXX", "sh")
    commands: list[list[str]] = []

    def loaded(command: list[str], cpu_flags: frozenset[str]) -> Mock:
        commands.append(command)
        return Mock(glmtune_products=lambda: 3)

    monkeypatch.setattr(native, "_load_library", loaded)
    native_library.cache_clear()
    try:
        library = native_library()
    finally:
        native_library.cache_clear()
    [command] = commands
    named = {"-march=native"} if switch == "1" else {"-mavx2", "-mfma", "-mf16c"}
    assert {word for word in command if word.startswith("-m")} == named
    assert library.rounds_activations
    # Bfloat16 matrices of PyTorch use it only where its AVX-512 code runs.
    assert library.matrix_unit == (has == "avx512" and switch == "1")


def test_it_is_compiled_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := native_library().refusal:
        pytest.skip(f"no native kernels: {reason}")
    monkeypatch.setenv("GLMTUNE_CACHE", str(tmp_path))
    try:
        for _ in range(2):
            native_library.cache_clear()
            assert native_library().refusal == ""
        [file] = tmp_path.iterdir()
        assert file.name.startswith("products-")
        assert file.suffix == ".so"
    finally:
        native_library.cache_clear()
