"""Measure the memory that quantizing on loading takes, against the size of the quantized weights.

python benchmarks/make_checkpoint.py --out /tmp/chatglm2-6b-random   # 12 GB on disk
python benchmarks/quantized_load_memory.py /tmp/chatglm2-6b-random --quantization int4 int8 int4-g64
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time

import torch

from glmtune.loading import load_base


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def measure(folder: str, quantization: str, dtype: str, warm_up: str | None) -> dict[str, object]:
    """Load in a forked process and return the figures; a warm-up pulls in lazy code first."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            if warm_up is not None:
                load_base(warm_up, dtype=dtype, device="cpu", quantization=quantization)
            before, start = resident_bytes(), time.perf_counter()
            model = load_base(folder, dtype=dtype, device="cpu", quantization=quantization)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            weights = sum(parameter.nbytes for parameter in model.parameters())
            figures: dict[str, object] = {
                "folder": folder,
                "quantization": quantization,
                "dtype": str(model.dtype),
                "threads": torch.get_num_threads(),
                "quantized_bytes": weights,
                "peak_bytes": peak - before,
                "ratio": (peak - before) / weights,
                "seconds": seconds,
            }
        except BaseException as error:  # the parent reports it
            figures = {"error": repr(error)}
        os.write(writer, json.dumps(figures).encode())
        os._exit("error" in figures)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.wait()
    return json.loads(text)


def main() -> int:
    """Print one JSON line per method; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="an unquantized checkpoint")
    parser.add_argument("--quantization", nargs="+", default=["int4"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--warm-up", help="a small checkpoint to load first")
    arguments = parser.parse_args()
    has_failed = False
    for name in arguments.quantization:
        result = measure(arguments.folder, name, arguments.dtype, arguments.warm_up)
        has_failed |= "error" in result
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
