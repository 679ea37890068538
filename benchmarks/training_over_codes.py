"""What a layer of codes costs in training on a CPU: processor time of its forward and backward pass.

OMP_NUM_THREADS=1 python benchmarks/training_over_codes.py --path native

Prints a line per shape, number of rows and type; see benchmarks/results/ptuning_int4_6b_shape.md.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from glmtune.quantization.arithmetic.methods import METHODS
from glmtune.quantization.kernels.for_training import prepare_for_training
from glmtune.quantization.layers.linear import QuantizedLinear

SHAPES = ((13696, 4096), (4096, 13696))
"""Outputs and inputs: the wider halves of an MLP of ChatGLM2-6B."""
ROWS = (128, 256, 512)
ROUNDS = 4


def layer_of(method: str, outputs: int, inputs: int) -> QuantizedLinear:
    """Return a layer of random codes."""
    layer = QuantizedLinear(inputs, outputs, layout=METHODS[method].layout(method))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-128, 128, layer.weight.shape, generator=generator))
        layer.weight_scale.fill_(0.004)
    return layer


def measure(layer: QuantizedLinear, rows: int, autocast: bool) -> tuple[float, float]:
    """Return the least seconds of processor time of forward and backward."""
    forward, backward = [], []
    for _ in range(ROUNDS):
        x_RI = torch.randn(rows, layer.in_features, requires_grad=True)
        start = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y_RO = layer(x_RI)
        forward.append(time.process_time() - start)
        gradient_RO = torch.randn_like(y_RO)
        start = time.process_time()
        y_RO.backward(gradient_RO)
        backward.append(time.process_time() - start)
    return min(forward), min(backward)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--path", choices=("plain", "native"), default="native")
    parser.add_argument("--method", choices=list(METHODS), default="int4")
    arguments = parser.parse_args()
    for outputs, inputs in SHAPES:
        layer = layer_of(arguments.method, outputs, inputs)
        if arguments.path == "native" and not prepare_for_training(layer):
            parser.error("there is no native product here")
        for rows in ROWS:
            for autocast in (False, True):
                forward, backward = measure(layer, rows, autocast)
                kind = "bfloat16 autocast" if autocast else "float32"
                sys.stdout.write(
                    f"{inputs} to {outputs}, {rows} rows, {kind}: {forward:.3f} s, {backward:.3f} s\n"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
