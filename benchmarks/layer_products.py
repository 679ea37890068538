r"""A layer of codes by every product that a processor can have: the plain path, PyTorch's, the compiled ones.

Answers two questions. Do PyTorch's products earn their place (`glmtune/quantization/kernels/int4pack.py`)? On
Windows, a Mac or a machine without a compiler they are all there is. And do the compiled ones, as on Linux?
All take turns; medians are reported, after a round that warms caches up. The second line measures, in PyTorch
and in our products, what a lesser processor than this would run (`avx2-vnni`: with a dot product of bytes).

python benchmarks/layer_products.py --inputs 2048 --outputs 2048 --rows 1 4 16 64 256
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 GLMTUNE_NATIVE_KERNELS=avx2 \
    python benchmarks/layer_products.py --layers 6
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

import torch

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.kernels.dispatch import Int4Product, Int8Product, Kernel, NativeProduct
from glmtune.quantization.kernels.native import SWITCH
from glmtune.quantization.layers.linear import QuantizedLinear

KERNELS: dict[str, tuple[Kernel, ...]] = {
    "plain": (),
    "PyTorch": (Int8Product(), Int4Product()),
    "native": (NativeProduct(),),
    "native-a8": (NativeProduct("native-a8", rounded=True),),
}


def options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=1, help="computed in turn: more than fit into caches")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--methods", nargs="+", default=["int8", "int4", "int4-g32-asym"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-plain", action="store_true", help="leave the plain path out, which takes long")
    return parser.parse_args()


def seconds(layers: Sequence[QuantizedLinear], inputs: torch.Tensor, repeats: int) -> float:
    """Time one product, averaged over some calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        for layer in layers:
            layer(inputs)
    return (time.perf_counter() - start) / repeats / len(layers)


def prepared(name: str, how: str, chosen: argparse.Namespace) -> list[QuantizedLinear] | None:
    """Return layers of a method with one kind of product; None where there is none for it."""
    method = METHODS[name]
    quantized = method.quantize(torch.randn(chosen.outputs, chosen.inputs) * 0.05)
    made: list[QuantizedLinear] = []
    for _ in range(chosen.layers):
        layer = QuantizedLinear(chosen.inputs, chosen.outputs, layout=method.layout(name))
        layer.put(quantized)
        if KERNELS[how]:
            taken = [kernel for kernel in KERNELS[how] if not kernel.refusal(layer, torch.bfloat16)]
            if not taken:
                return None
            layer.use(taken[0].prepared(layer))
        made.append(layer)
    return made


def main() -> None:
    """Take turns, then print a table."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    kinds = [how for how in KERNELS if how != "plain" or not chosen.no_plain]
    print(f"PyTorch: {torch.backends.cpu.get_cpu_capability()}, our own: {os.environ.get(SWITCH, '1')}")
    print(f"| method | rows | {', ms | '.join(kinds)}, ms | GB/s of codes, the same order |")
    print(f"|---|---:|{'---:|' * len(kinds)}---:|")
    for name in chosen.methods:
        arms = {how: layers for how in kinds if (layers := prepared(name, how, chosen)) is not None}
        gigabytes = chosen.inputs * chosen.outputs * METHODS[name].bits / 8e9
        for rows in chosen.rows:
            inputs = torch.randn(rows, chosen.inputs).bfloat16()
            found: dict[str, list[float]] = {how: [] for how in arms}
            for number in range(chosen.rounds + 1):
                for how, layers in arms.items():
                    took = seconds(layers, inputs, repeats=max(1, 16 // rows // chosen.layers))
                    if number:
                        found[how].append(took)
            took = {how: statistics.median(times) for how, times in found.items()}
            cells = [f"{1000 * took[how]:.2f}" if how in took else "-" for how in kinds]
            rates = [f"{gigabytes / took[how]:.1f}" if how in took else "-" for how in kinds]
            print(f"| {name} | {rows} | {' | '.join(cells)} | {', '.join(rates)} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
