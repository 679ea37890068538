"""Measure how much memory loading a checkpoint takes, beyond what Python and its libraries take.

python benchmarks/load_memory.py /tmp/chatglm2-6b-random --dtype auto float16
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import time

from glmtune.models.load import load_base


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def measure(folder: str, dtype: str, warm_up: str | None) -> dict[str, object]:
    """Load once in a forked process and return its figures; the warm-up pulls lazily loaded code in first."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            if warm_up is not None:
                load_base(warm_up, dtype=dtype, device="cpu")
            before, start = resident_bytes(), time.perf_counter()
            model = load_base(folder, dtype=dtype, device="cpu")
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            weights = sum(parameter.nbytes for parameter in model.parameters())
            figures = {
                "dtype": str(model.dtype),
                "weights_bytes": weights,
                "peak_bytes": peak - before,
                "baseline_bytes": before,
                "ratio": (peak - before) / weights,
                "seconds": seconds,
            }
            os.write(writer, json.dumps(figures).encode())
            os._exit(0)
        except BaseException as error:  # the parent reports it
            os.write(writer, json.dumps({"error": repr(error)}).encode())
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.wait()
    return json.loads(text)


def main() -> None:
    """Print one line of JSON per type asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--warm-up", help="small checkpoint to load first, so that code is not counted")
    options = parser.parse_args()
    for folder, dtype in itertools.product(options.folders, options.dtype):
        figures = {"folder": folder} | measure(folder, dtype, options.warm_up)
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
