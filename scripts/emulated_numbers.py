"""Multiply small layers of codes by what this processor offers, and compare with the plain path in float64.

First PyTorch's products, then our own, compiled for AVX2.

Run as `python scripts/emulated_numbers.py`; `scripts/emulated_numbers.sh` does so in an emulator, as some
processor that is not here. What it prints is about numbers, never about speed. The exit code is 1 where a
product is off by more than bfloat16 explains, or codes do not come back as they were.
"""

from __future__ import annotations

import os
import platform
import sys

import torch

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.arithmetic.primitives import round_activations
from glmtune.quantization.kernels.dispatch import choose_kernel
from glmtune.quantization.kernels.int4pack import panel_outputs
from glmtune.quantization.kernels.native import SWITCH, native_library
from glmtune.quantization.kernels.packed import ACTIVATION_BLOCK
from glmtune.quantization.layers.linear import QuantizedLinear

# By name: an emulator does not change what /proc/cpuinfo says, and the compiler runs on the real processor,
# whose instructions -march=native would take.
SWITCHES = ("0", "avx2")
SHAPES = ((64, 128), (48, 256), (176, 64))
"""Outputs and inputs: whole panels, a part of one, both."""
ROWS = (1, 5, 16, 40)
TOLERANCE = 0.02
"""Of the largest output: bfloat16 scales and outputs; the same as in tests/quantization/kernels."""


def layer(method: str, outputs: int, inputs: int) -> QuantizedLinear:
    """Return a layer of codes of random weights, the same everywhere."""
    chosen = METHODS[method]
    made = QuantizedLinear(inputs, outputs, layout=chosen.layout(method))
    generator = torch.Generator().manual_seed(2)
    made.put(chosen.quantize(torch.randn(outputs, inputs, generator=generator) * 0.05))
    return made


def compared(method: str, activations: str | None) -> tuple[str, float, bool]:
    """Return which product ran, its largest error (of the largest output), and whether codes came back."""
    worst, names, kept = 0.0, set[str](), True
    for outputs, inputs in SHAPES:
        made = layer(method, outputs, inputs)
        exact_OI = made.dequantized(torch.float64)
        codes = made.stored_codes().clone()
        kernel = choose_kernel(made, torch.bfloat16, activations)
        names.add("plain" if kernel is None else kernel.name)
        if kernel is not None:
            made.use(kernel.prepared(made))
        for rows in ROWS:
            x_RI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
            seen_RI = x_RI.double()
            if activations is not None:
                seen_RI = round_activations(x_RI.float(), block=made.group_size or ACTIVATION_BLOCK).double()
            expected = seen_RI @ exact_OI.T
            worst = max(worst, float((made(x_RI).double() - expected).abs().max() / expected.abs().max()))
        made.use(None)
        kept = kept and torch.equal(made.stored_codes(), codes)
    return "+".join(sorted(names)), worst, kept


def main() -> int:
    """Print a row for each method that needs no calibration."""
    capability = torch.backends.cpu.get_cpu_capability()
    sys.stdout.write(
        f"{platform.machine()}, PyTorch {torch.__version__}: {capability}, panels of {panel_outputs()}\n"
    )
    failed = False
    methods = sorted(name for name, each in METHODS.items() if not (each.calibrated or each.library))
    for switch in SWITCHES:
        os.environ[SWITCH] = switch
        native_library.cache_clear()
        if switch != "0" and native_library().refusal:
            sys.stdout.write(f"no products of our own: {native_library().refusal}\n")
            continue
        for activations in (None,) if switch == "0" else (None, "int8"):
            for method in methods:
                name, error, kept = compared(method, activations)
                failed = failed or error > TOLERANCE or not kept
                said = "codes kept" if kept else "CODES CHANGED"
                sys.stdout.write(f"{method:15} {name:10} largest error {100 * error:.2f} %, {said}\n")
    return int(failed)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
