"""Measure the memory that loading a checkpoint and generating take, beyond Python and its libraries.

python benchmarks/load_memory.py /tmp/chatglm2-6b-random --dtype auto float16 --new-tokens 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import time

import torch

from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.load import GlmModel, load_official


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def measure(folder: str, dtype: str, warm_up: str | None, new_tokens: int) -> dict[str, object]:
    """Load (and generate) in a forked process and return the figures; a warm-up pulls in lazy code first."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            if warm_up is not None:
                load_official(warm_up, dtype=dtype, device="cpu")
            before, start = resident_bytes(), time.perf_counter()
            model = load_official(folder, dtype=dtype, device="cpu")
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
            if new_tokens:
                figures |= generation_figures(model, new_tokens, before)
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


def generation_figures(model: GlmModel, new_tokens: int, before: int) -> dict[str, object]:
    """Generate greedily after a random prompt of 64 tokens."""
    ids = torch.randint(100, 1000, (1, 64))
    if isinstance(model.config, ChatGlmConfig):
        ids[0, -2:] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    start = time.perf_counter()
    text = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "generated_tokens": text.shape[1] - ids.shape[1],
        "generate_seconds": time.perf_counter() - start,
        "generate_peak_bytes": peak - before,
    }


def main() -> None:
    """Print one line of JSON per type asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--new-tokens", type=int, default=0, help="tokens to generate after loading")
    parser.add_argument("--warm-up", help="small checkpoint to load first, so that code is not counted")
    options = parser.parse_args()
    for folder, dtype in itertools.product(options.folders, options.dtype):
        figures = {"folder": folder} | measure(folder, dtype, options.warm_up, options.new_tokens)
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
