"""A layer of codes where the compiled kernels do not run: the plain path against PyTorch's products.

Answers whether `glmtune/quantization/kernels/int4pack.py` and the products around it earn their place: on
Windows, a Mac or a machine without AVX-512 they are all there is.
Both paths take turns; medians are reported.

python benchmarks/layer_products.py --width 2048 --rows 1 4 16 64 256
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ["GLMTUNE_NATIVE_KERNELS"] = "0"  # read when the first kernel is chosen

import torch

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.kernels.dispatch import choose_kernel
from glmtune.quantization.layers.linear import QuantizedLinear


def seconds(layer: QuantizedLinear, inputs: torch.Tensor, repeats: int) -> float:
    """Time one product, averaged over some calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        layer(inputs)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Take turns, then print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048, help="inputs and outputs of the layer")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--methods", nargs="+", default=["int8", "int4", "int4-g32-asym"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| method | rows | plain, ms | PyTorch's product, ms | plain / product |\n|---|---:|---:|---:|---:|"
    )
    for name in options.methods:
        method = METHODS[name]
        layer = QuantizedLinear(options.width, options.width, layout=method.layout(name))
        layer.put(method.quantize(torch.randn(options.width, options.width) * 0.05))
        kernel = choose_kernel(layer, torch.bfloat16)
        assert kernel is not None, f"no product of PyTorch's takes {name} here"
        product = kernel.prepared(layer)
        for rows in options.rows:
            inputs = torch.randn(rows, options.width).bfloat16()
            found: dict[bool, list[float]] = {False: [], True: []}
            for number in range(options.rounds + 1):
                for fast in (False, True):
                    layer.use(product if fast else None)
                    took = seconds(layer, inputs, repeats=max(1, 16 // rows))
                    if number:  # the first round warms caches up
                        found[fast].append(1000 * took)
            plain, packed = (statistics.median(found[fast]) for fast in (False, True))
            print(f"| {name} | {rows} | {plain:.2f} | {packed:.2f} | {plain / packed:.1f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
