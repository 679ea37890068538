"""Decoding, prefill and memory of one way to hold the weights; the model is made on the device.

    python -m benchmarks.gpu.decode --method int4 --device cuda

`nf4` and `torchao-int4` are the libraries of others, on the same model; `--compiled` decodes with
`torch.compile`, as `model.chat(..., compile=True)` does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.gpu.rivals import RIVALS, quantize_by
from benchmarks.gpu.worker import GIB, Figures, Peak, Sizes, parse_words, seconds_since
from benchmarks.random_model import random_model
from glmtune.models.architectures import compiling
from glmtune.models.architectures.kv_cache import let_grow
from glmtune.quantization.kernels.dispatch import prepare_for_inference

OWN = ("bf16", "int8", "int4")
PIECE = 512
"""Tokens read at once on the way to a long context."""
MOST_SECONDS = 12.0
"""Of one generation; slow cards give fewer tokens."""


def ids(tokens: int, model: Any) -> torch.Tensor:
    """Return random ids ``[1, tokens]`` on the model's device."""
    return torch.randint(5, model.config.vocab_size, (1, tokens), device=model.device)


@torch.inference_mode()
def prefill_rate(model: Any, sizes: Sizes, device: str) -> float:
    """Return tokens/s of reading the long prompt: the median."""
    rates = []
    for _ in range(sizes.rounds + 1):
        prompt_1S = ids(sizes.prompt, model)
        start = time.perf_counter()
        model(input_ids=prompt_1S, use_cache=True, logits_to_keep=1)
        rates.append(sizes.prompt / seconds_since(start, device))
    return statistics.median(rates[1:])  # the first one loads kernels


@torch.inference_mode()
def decode_rate(model: Any, sizes: Sizes, device: str, **how: Any) -> float:
    """Return tokens/s of `generate`, greedy, one row behind 8 tokens, with all that `generate` does."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_time": MOST_SECONDS, **how}
    model.generate(ids(8, model), max_new_tokens=8, **settings)
    prompt_1S = ids(8, model)
    start = time.perf_counter()
    found_1S = model.generate(prompt_1S, max_new_tokens=sizes.new, **settings)
    return (found_1S.shape[1] - 8) / seconds_since(start, device)


@torch.inference_mode()
def hold_context(model: Any, sizes: Sizes) -> None:
    """Fill a cache as a long answer would leave it, and go on from there."""
    cache = DynamicCache(config=model.config)
    let_grow(cache)
    for _ in range(0, sizes.context, PIECE):
        model(input_ids=ids(min(PIECE, sizes.context), model), cache=cache, use_cache=True, logits_to_keep=1)
    for _ in range(4):
        model(input_ids=ids(1, model), cache=cache, use_cache=True, logits_to_keep=1)


def main() -> int:
    """Measure one method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", required=True, choices=[*OWN, *RIVALS])
    parser.add_argument("--compiled", action="store_true")
    options = parse_words(parser)
    sizes, device, figures = options.sizes, options.device, Figures(options.out)
    own = options.method if options.method in OWN[1:] else None
    model: Any = random_model(sizes.shape, own, device=device)
    if options.method in RIVALS:
        figures.add(library=quantize_by(options.method, model, device))
    else:
        figures.add(products=prepare_for_inference(model))
    if options.compiled:
        if options.dry_run:  # traced, not compiled: the compiler for CPUs takes a minute
            compiling.BACKEND = "eager"
        how = compiling.compiled_generation(torch.device(device))
        figures.add(decode=decode_rate(model, sizes, device, **how))
        return 0
    figures.add(weights_gib=sum(t.nbytes for t in model.parameters()) / GIB)
    figures.add(decode=decode_rate(model, sizes, device))
    prefill_rate(model, sizes, device)
    peak = Peak(device)
    figures.add(prefill=prefill_rate(model, sizes, device))
    figures.add(encode_tensors_gib=peak.tensors / GIB, encode_taken_gib=peak.taken / GIB)
    peak = Peak(device)
    hold_context(model, sizes)
    figures.add(context_tensors_gib=peak.tensors / GIB, context_taken_gib=peak.taken / GIB)
    return 0


if __name__ == "__main__":
    sys.exit(main())
