"""Measure the memory that reading a long prompt takes at its peak, beyond the model itself.

prompt     one prompt
prefix     the same with a prefix of 128 attached
padded     two prompts of half and full length in one batch, padded on the left
next turn  the second half of the text, the first half being in the cache of earlier turns
ChatGLM-6B one prompt of the first generation (released for 2,048 positions)

The models are random: 2 layers, width 64, a vocabulary of 4,992, the rules of ChatGLM3-6B-32K (of ChatGLM-6B
in the last case). Each measurement is a forked process that has read a short prompt before, so that loaded
code is not counted.

OMP_NUM_THREADS=1 python benchmarks/long_context.py
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable

import torch
from forked import in_child

from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import GenerationSettings
from glmtune.models.chat.stream import PREFILL_CHUNK_TOKENS, ConversationCache, stream_tokens
from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import GlmModel, build_model
from glmtune.models.releases.families import Family
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

VOCABULARY = 4992
OFFICIAL = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "kv_channels": 32,
    "num_attention_heads": 2,
    "multi_query_attention": True,
    "multi_query_group_num": 1,
    "padded_vocab_size": VOCABULARY,
    "seq_length": 32768,
    "rope_ratio": 50,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
FIRST_OFFICIAL = {
    "num_layers": 2,
    "hidden_size": 64,
    "inner_hidden_size": 256,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_sequence_length": 2048,
    "mask_token_id": VOCABULARY - 6,
    "gmask_token_id": VOCABULARY - 5,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "torch_dtype": "float32",
}


def make_model(case: str) -> GlmModel:
    torch.manual_seed(0)
    first = case == "ChatGLM-6B"
    official, family = (FIRST_OFFICIAL, Family.CHATGLM) if first else (OFFICIAL, Family.CHATGLM3_32K)
    return build_model(native_config(official, family)).eval()


def random_ids(length: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,)).tolist()


def read_prompt(model: GlmModel, length: int) -> None:
    settings = GenerationSettings(max_new_tokens=1, max_batch_tokens=1 << 20)
    list(generate_ids(model, [random_ids(length - 1)], settings, stop_ids=[2], pad_id=0))


def read_behind_prefix(model: GlmModel, length: int) -> None:
    attach_prefix(model, PrefixEncoder(prefix_shape(model.config), pre_seq_len=128).eval())
    read_prompt(model, length)


def read_padded(model: GlmModel, length: int) -> None:
    settings = GenerationSettings(max_new_tokens=1, max_batch_tokens=1 << 20)
    prompts = [random_ids(length - 1), random_ids(length // 2)]
    list(generate_ids(model, prompts, settings, stop_ids=[2], pad_id=0))


def read_next_turn(model: GlmModel, length: int) -> None:
    cache, ids = ConversationCache(), random_ids(length - 1)
    settings = {"cache": cache, "max_new_tokens": 1, "do_sample": False}
    list(stream_tokens(model, ids[: length // 2], **settings))
    list(stream_tokens(model, ids, prefill_chunk_size=PREFILL_CHUNK_TOKENS, **settings))


def read_first_generation(model: GlmModel, length: int) -> None:
    context = [token % (VOCABULARY - 6) for token in random_ids(length - 2)]
    ids = [*context, model.config.gmask_token_id, model.config.bos_token_id]
    list(stream_tokens(model, ids, max_new_tokens=1, do_sample=False))


CASES: dict[str, Callable[[GlmModel, int], None]] = {
    "prompt": read_prompt,
    "prefix": read_behind_prefix,
    "padded": read_padded,
    "next turn": read_next_turn,
    "ChatGLM-6B": read_first_generation,
}


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def peak_mib(case: str, length: int) -> float:
    """Run one case in a forked process and return its peak beyond what it held before, MiB."""

    def run() -> dict[str, float]:
        model = make_model(case)
        CASES[case](model, 16)
        before = resident_bytes()
        CASES[case](model, length)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"mib": (peak - before) / 2**20}

    return in_child(run)["mib"]


def main() -> None:
    """Measure every case at every length and print one table, MiB."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    options = parser.parse_args()
    head = ["tokens", *CASES, "a boolean mask, S x S", "logits of the prompt"]
    sys.stdout.write(f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n")
    for length in options.lengths:
        avoided = [length**2 / 2**20, length * VOCABULARY * 4 / 2**20]
        figures = [peak_mib(case, length) for case in CASES] + avoided
        sys.stdout.write(f"| {length:,} | {' | '.join(f'{figure:,.0f}' for figure in figures)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
