"""Tokens per second and memory of quantized models on a CPU: a prompt read, and decoding at batch 1 and 8.

python benchmarks/quantized_inference.py --threads 2 --out benchmarks/results/quantized_inference.json

The model has the shape of ChatGLM2-6B and random codes, made in memory. Each configuration runs in a process
of its own; the rounds are interleaved. `--layers 2 --hidden 256 --ffn 512 --vocab 1024 --heads 8` is a quick
check.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmtune.models.config import native_config
from glmtune.models.families import Family
from glmtune.models.glm import OfficialGlmForCausalLM
from glmtune.quantization.apply import replace_layers
from glmtune.quantization.kernels import prepare_for_inference
from glmtune.quantization.linear import QuantizedLinear
from glmtune.quantization.plan import plan_layout

CONFIGURATIONS = ("none", "int8 plain", "int8", "int4 plain", "int4", "int4-g64", "int4-g32-asym")
"""Method; ``plain``: without kernels."""


def random_model(arguments: argparse.Namespace, method: str) -> OfficialGlmForCausalLM:
    """Make a bfloat16 model with random weights or random codes, allocated once."""
    official = {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "ffn_hidden_size": arguments.ffn,
        "kv_channels": arguments.hidden // arguments.heads,
        "num_attention_heads": arguments.heads,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "padded_vocab_size": arguments.vocab,
        "seq_length": 32768,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
    }
    config = native_config(official, Family.CHATGLM2)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = OfficialGlmForCausalLM(config)
        if method != "none":
            layout = plan_layout(config, method)
            layout.put_into(model.config)
            replace_layers(model, layout)
    model._apply(
        lambda t: torch.empty_like(
            t, device="cpu", dtype=torch.bfloat16 if t.is_floating_point() else t.dtype
        )
    )
    model.rebuild_rotary()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                nn.init.normal_(parameter, std=0.02)
            else:
                parameter.random_(-127, 127)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.weight_scale.fill_(0.004)
    return model.eval()


@torch.inference_mode()
def tokens_per_second(model: Any, batch: int, prompt: int, new: int) -> tuple[float, float]:
    """Return tokens/s of reading a prompt of ``prompt`` tokens in each row, and of ``new`` decoding steps."""
    ids = torch.randint(5, model.config.vocab_size, (batch, prompt))
    start = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    read = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, cache=output.cache, use_cache=True, logits_to_keep=1)
    return batch * prompt / read, batch * new / (time.perf_counter() - start)


def measure(arguments: argparse.Namespace, configuration: str) -> dict[str, object]:
    """Measure one configuration in this process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    method, _, plain = configuration.partition(" ")
    model = random_model(arguments, method)
    kernels = {} if plain or method == "none" else prepare_for_inference(model)
    tokens_per_second(model, 1, 8, 1)
    prefill, decode = tokens_per_second(model, 1, arguments.prompt, arguments.new)
    _, decode_8 = tokens_per_second(model, 8, 8, arguments.new)
    return {
        "configuration": configuration,
        "kernels": kernels,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "decode_batch_8_tokens_per_second": decode_8,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }


def _worker(arguments: argparse.Namespace, configuration: str, queue: Any) -> None:
    queue.put(measure(arguments, configuration))


def main() -> int:
    """Run all rounds, print one JSON line each, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("layers", 28), ("hidden", 4096), ("ffn", 13696), ("vocab", 65024), ("heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("prompt", 512), ("new", 16), ("threads", 2), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    context = multiprocessing.get_context("spawn")
    for number in range(arguments.rounds):
        for configuration in arguments.configurations:
            queue = context.Queue()
            process = context.Process(target=_worker, args=(arguments, configuration, queue))
            process.start()
            process.join()
            if process.exitcode:
                sys.stderr.write(f"{configuration} ended with exit code {process.exitcode}\n")
                return 1
            results.append({"round": number, **queue.get()})
            sys.stdout.write(json.dumps(results[-1]) + "\n")
            sys.stdout.flush()
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
