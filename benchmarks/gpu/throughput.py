"""Tokens per second of the request engine with 1, 16 and 64 rows at once.

python -m benchmarks.gpu.throughput --method bf16 --device cuda
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

from benchmarks.gpu.worker import GIB, Figures, Peak, Sizes, parse_words, seconds_since
from benchmarks.random_model import random_model
from glmtune.inference.engine.engine import Engine
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.quantization.kernels.dispatch import prepare_for_inference

ROWS = (1, 16, 64)


def tokens_per_second(engine: Engine, rows: int, sizes: Sizes, vocab: int, device: str) -> float:
    """Let so many requests run at once, each with a prompt of its own and an answer of fixed length."""
    sampling = Sampling(max_new_tokens=sizes.engine_new, ignore_eos=True)
    prompts = [tuple(random.randrange(5, vocab) for _ in range(sizes.engine_prompt)) for _ in range(rows)]
    start = time.perf_counter()
    running = [engine.submit(Request(prompt_ids=prompt, sampling=sampling)) for prompt in prompts]
    count = 0
    for generation in running:
        for piece in generation:
            if piece.error:
                raise SystemExit(piece.error)
            count += len(piece.token_ids)
    if count != rows * sizes.engine_new:
        raise SystemExit(f"{count} tokens came, but {rows} answers have {sizes.engine_new} each")
    return count / seconds_since(start, device)


def main() -> int:
    """Measure one method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", default="bf16", choices=["bf16", "int8", "int4"])
    options = parse_words(parser)
    random.seed(0)
    sizes, device, figures = options.sizes, options.device, Figures(options.out)
    method = None if options.method == "bf16" else options.method
    model: Any = random_model(sizes.shape, method, device=device)
    prepare_for_inference(model)
    peak = Peak(device)
    with Engine(model) as engine:
        for rows in ROWS:
            tokens_per_second(
                engine, rows, sizes, sizes.shape.vocab, device
            )  # kernels are loaded, memory taken
            figures.add(**{f"rows_{rows}": tokens_per_second(engine, rows, sizes, sizes.shape.vocab, device)})
    figures.add(taken_gib=peak.taken / GIB)
    return 0


if __name__ == "__main__":
    sys.exit(main())
