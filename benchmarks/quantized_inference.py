"""Tokens per second and peak memory of quantized models on a CPU, beside llama.cpp and the released route.

python benchmarks/quantized_inference.py --llama-python /tmp/llama-venv/bin/python --out results.json

The model has the shape of ChatGLM2-6B and random codes, made in memory. Each configuration runs in a process
of its own, the rounds are interleaved, the best of them counts. llama.cpp (`llama_cpp_inference.py` beside
this file) needs a Python with `llama-cpp-python` and `gguf`, which need not be this one; without
`--llama-python` it is left out.
`--layers 2 --hidden 256 --ffn 512 --vocab 1024 --heads 8` is a quick check.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from random_model import Shape, random_model
from torch import Tensor, nn

from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.kernels.native import SWITCH
from glmtune.quantization.layers.linear import Product, QuantizedLinear

GLMTUNE = {
    "bf16": ("none", "plain"),
    "int8 plain": ("int8", "plain"),
    "int8 torch": ("int8", "torch"),
    "int8": ("int8", "native"),
    "int8 a8": ("int8", "a8"),
    "int4 released": ("int4", "released"),
    "int4 plain": ("int4", "plain"),
    "int4 torch": ("int4", "torch"),
    "int4": ("int4", "native"),
    "int4 a8": ("int4", "a8"),
    "int4 e8": ("int4", "e8"),
    "int4 a8 e8": ("int4", "a8 e8"),
    "int4-g128": ("int4-g128", "native"),
    "int4-g128 a8": ("int4-g128", "a8"),
    "int4-g32": ("int4-g32", "native"),
}
"""Name → method and how it is multiplied: plain path, PyTorch's kernels, ours (a8: with INT8 activations, e8:
embedding and head in INT8 as well), or as the released code does on CPUs: codes to a float32 matrix in a C
loop, then a float32 product."""
LLAMA = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q8_0": "Q8_0"}
RELEASED = """
#include <stdint.h>
void to_float(const int8_t *codes, const float *scale, float *out, int64_t rows, int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < bytes; ++j) {
      int8_t both = codes[i * bytes + j];
      out[(i * bytes + j) * 2] = (both >> 4) * scale[i];
      out[(i * bytes + j) * 2 + 1] = ((int8_t)(both << 4) >> 4) * scale[i];
    }
}
"""
RELEASED_FLAGS = ("-O3", "-fPIC", "-fopenmp", "-std=c99", "-shared")
"""Those of the released code: no instruction set of the machine's own."""


def shaped_model(arguments: argparse.Namespace, method: str) -> OfficialGlmForCausalLM:
    """Make a bfloat16 model with random weights or random codes."""
    shape = Shape(
        layers=arguments.layers,
        hidden=arguments.hidden,
        ffn=arguments.ffn,
        vocab=arguments.vocab,
        heads=arguments.heads,
    )
    return random_model(shape, None if method == "none" else method)


def released_product(layer: QuantizedLinear, to_float: Callable[..., None]) -> Product:
    """Return the product as the released code computes it."""
    codes_OB, scale_O = layer.weight.detach(), layer.weight_scale.detach().float()

    def multiply(x_RI: Tensor) -> Tensor:
        weight_OI = torch.empty(layer.out_features, layer.in_features)
        pointers = (codes_OB.data_ptr(), scale_O.data_ptr(), weight_OI.data_ptr())
        to_float(*pointers, *codes_OB.shape, torch.get_num_threads())
        return (x_RI.float() @ weight_OI.T).to(x_RI.dtype)

    return Product(multiply)


def use_released_products(model: nn.Module) -> dict[str, int]:
    """Compile the loop and let every layer of codes use it."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "released.c", Path(folder) / "released.so"
        source.write_text(RELEASED)
        subprocess.run(["gcc", *RELEASED_FLAGS, str(source), "-o", str(library)], check=True)
        to_float = ctypes.CDLL(str(library)).to_float
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    to_float.argtypes = [pointer, pointer, pointer, long, long, ctypes.c_int]
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.use(released_product(layer, to_float))
    return {"released": len(layers)}


def prepare(model: nn.Module, how: str) -> Mapping[str, int]:
    """Give the layers their products; say how many have which."""
    if how == "released":
        return use_released_products(model)
    if how == "plain":
        return {}
    os.environ[SWITCH] = "0" if how == "torch" else os.environ.get(SWITCH, "1")
    rounded = how.split()
    return prepare_for_inference(
        model,
        activations="int8" if "a8" in rounded else None,
        embeddings="int8" if "e8" in rounded else None,
    )


@torch.inference_mode()
def prompt_rate(model: Any, tokens: int) -> float:
    """Return tokens/s of reading a prompt."""
    ids_1S = torch.randint(5, model.config.vocab_size, (1, tokens))
    start = time.perf_counter()
    model(input_ids=ids_1S, use_cache=True, logits_to_keep=1)
    return tokens / (time.perf_counter() - start)


@torch.inference_mode()
def decode_rate(model: Any, batch: int, arguments: argparse.Namespace) -> float:
    """Return tokens/s of decoding behind 8 tokens: the median step, two steps at least."""
    ids_BS = torch.randint(5, model.config.vocab_size, (batch, 8))
    output = model(input_ids=ids_BS, use_cache=True, logits_to_keep=1)
    steps: list[float] = []
    while len(steps) < 2 or (len(steps) < arguments.new and sum(steps) < arguments.seconds):
        token_B1 = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(input_ids=token_B1, cache=output.cache, use_cache=True, logits_to_keep=1)
        steps.append(time.perf_counter() - start)
    return batch / sorted(steps)[len(steps) // 2]


def measure(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    """Measure one of our configurations in this process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    method, how = GLMTUNE[name]
    model = shaped_model(arguments, method)
    kernels = prepare(model, how)
    prompt_rate(model, 8)
    found: dict[str, object] = {
        "configuration": name,
        "prefill": prompt_rate(model, arguments.prompt),
        "decode": decode_rate(model, 1, arguments),
        "decode_8": decode_rate(model, 8, arguments),
    }
    return {
        **found,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "kernels": kernels,
    }


def _worker(arguments: argparse.Namespace, name: str, queue: Any) -> None:
    queue.put(measure(arguments, name))


def measure_apart(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure one of our configurations in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_worker, args=(arguments, name, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} ended with exit code {process.exitcode}")
    return queue.get()


def measure_llama(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure llama.cpp with its own Python; the file is written first if it is not there."""
    script = Path(__file__).with_name("llama_cpp_inference.py")
    command = [str(arguments.llama_python), str(script), "--type", LLAMA[name], "--folder", arguments.gguf]
    for option in ("layers", "hidden", "ffn", "vocab", "heads", "prompt", "new", "threads", "seconds"):
        command += [f"--{option}", str(getattr(arguments, option))]
    if getattr(arguments, "cpu_time", False):
        command.append("--cpu-time")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"configuration": name, **json.loads(done.stdout.splitlines()[-1])}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("layers", 28), ("hidden", 4096), ("ffn", 13696), ("vocab", 65024), ("heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("prompt", 512), ("new", 16), ("threads", 2), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=8, help="of decoding, at most, per batch size")
    parser.add_argument("--configurations", nargs="+", choices=[*GLMTUNE, *LLAMA])
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--gguf", default="/tmp", help="folder for llama.cpp's files (3.6 and 6.7 GB)")
    parser.add_argument("--out", type=Path, help="JSON file of all measurements")
    return parser.parse_args()


def main() -> int:
    """Run all rounds, print one JSON line each, and write them to a file."""
    arguments = parse_arguments()
    names = arguments.configurations or [*GLMTUNE, *(LLAMA if arguments.llama_python else ())]
    results = []
    for number in range(arguments.rounds):
        for name in names:
            found = (measure_llama if name in LLAMA else measure_apart)(arguments, name)
            results.append({"round": number, **found})
            sys.stdout.write(json.dumps(results[-1]) + "\n")
            sys.stdout.flush()
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
