"""llama.cpp at the shape of ChatGLM2-6B: write random weights as GGUF, measure prefill, decoding and memory.

Runs in a Python of its own (called by `benchmarks/quantized_inference.py --llama-python`):

    python -m venv /tmp/llama-venv
    /tmp/llama-venv/bin/pip install llama-cpp-python gguf numpy    # compiles llama.cpp: minutes

Q4_0 files hold the head as Q6_K and the rest as Q4_0, as `llama-quantize` writes them; Q8_0 files are all
Q8_0.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf

try:
    import llama_cpp
except ImportError:  # a file can be written without it
    llama_cpp = None
import numpy as np

BLOCKS = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q6_K": (256, 210)}
"""Type → weights and bytes of a block."""
SCALE_AT = {"Q4_0": 0, "Q8_0": 0, "Q6_K": 208}
"""Byte at which the float16 scale of a block lies."""
TILE_BLOCKS = 2**16


def tensors(options: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and type of every tensor."""
    hidden, ffn, kind = options.hidden, options.ffn, options.type
    head_dim = hidden // options.heads
    yield "token_embd.weight", (options.vocab, hidden), kind
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (options.vocab, hidden), "Q6_K" if kind == "Q4_0" else kind
    for layer in range(options.layers):
        inside = {
            "attn_norm.weight": (hidden,),
            "attn_qkv.weight": (hidden + 4 * head_dim, hidden),
            "attn_qkv.bias": (hidden + 4 * head_dim,),
            "attn_output.weight": (hidden, hidden),
            "ffn_norm.weight": (hidden,),
            "ffn_up.weight": (2 * ffn, hidden),
            "ffn_down.weight": (hidden, ffn),
        }
        for name, shape in inside.items():
            yield f"blk.{layer}.{name}", shape, kind if len(shape) == 2 else "F32"


def random_data(shape: tuple[int, ...], kind: str, tiles: dict[str, np.ndarray]) -> np.ndarray:
    """Return random bytes of a tensor whose weights are about as large as trained ones."""
    if kind == "F32":
        return np.ones(shape, dtype=np.float32)
    weights, size = BLOCKS[kind]
    count = int(np.prod(shape)) // weights
    if kind not in tiles:
        tile = np.random.default_rng(0).integers(0, 256, (TILE_BLOCKS, size), dtype=np.uint8)
        scale = np.full(TILE_BLOCKS, 0.004 if kind == "Q4_0" else 0.0002, dtype=np.float16)
        tile[:, SCALE_AT[kind] : SCALE_AT[kind] + 2] = scale.view(np.uint8).reshape(-1, 2)
        tiles[kind] = tile
    data = np.resize(tiles[kind], (count, size))
    return data.reshape(*shape[:-1], -1)


def write(options: argparse.Namespace, file: Path) -> None:
    """Write the model, tensor by tensor."""
    partial, tiles = file.with_suffix(".partial"), {}
    writer = gguf.GGUFWriter(partial, "chatglm")
    writer.add_context_length(32768)
    writer.add_embedding_length(options.hidden)
    writer.add_feed_forward_length(options.ffn)
    writer.add_block_count(options.layers)
    writer.add_head_count(options.heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(options.hidden // options.heads // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(options.vocab)
    if options.words:  # a server turns tokens into text
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, options.vocab))])
        writer.add_token_scores([0.0] * options.vocab)
        writer.add_token_types([2, 3, 3, *[1] * (options.vocab - 3)])
    else:
        writer.add_tokenizer_model("none")
    for name, shape, kind in tensors(options):
        data = random_data(shape, kind, tiles)
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in tensors(options):
        writer.write_tensor_data(random_data(shape, kind, tiles))
    writer.close()
    partial.rename(file)


class Context:
    """A loaded model that reads tokens."""

    def __init__(self, file: Path, threads: int, num_tokens: int, *, cpu_time: bool = False) -> None:
        """Load as llama.cpp does by default: memory-mapped, repacked for this processor."""
        self.clock = time.process_time if cpu_time else time.perf_counter
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 8 * num_tokens, num_tokens, num_tokens
        options.n_seq_max, options.n_threads, options.n_threads_batch = 8, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.batch = llama_cpp.llama_batch_init(num_tokens, 0, 1)

    def clear(self) -> None:
        """Forget what was read."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def read(self, tokens: Any, positions: Any, rows: Any) -> float:
        """Read tokens, form logits for the last of every row, and return the seconds it took."""
        self.batch.n_tokens = len(tokens)
        last = {row: place for place, row in enumerate(rows)}
        for place, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
            self.batch.token[place], self.batch.pos[place] = int(token), int(position)
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, row
            self.batch.logits[place] = last[row] == place
        start = self.clock()
        if llama_cpp.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        return self.clock() - start


def measure(options: argparse.Namespace, file: Path) -> dict[str, float]:
    """Return tokens/s and peak memory, measured as `quantized_inference.py` does for our own models."""
    context = Context(file, options.threads, max(options.prompt, 64), cpu_time=options.cpu_time)
    random = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return random.integers(5, options.vocab, count)

    def decode(batch: int) -> float:
        context.clear()
        context.read(
            ids(8 * batch),
            [p for _ in range(batch) for p in range(8)],
            [r for r in range(batch) for _ in range(8)],
        )
        steps: list[float] = []
        while len(steps) < 2 or (len(steps) < options.new and sum(steps) < options.seconds):
            steps.append(context.read(ids(batch), [8 + len(steps)] * batch, list(range(batch))))
        return batch / sorted(steps)[len(steps) // 2]

    context.read(ids(8), range(8), [0] * 8)
    context.clear()
    prefill = options.prompt / context.read(ids(options.prompt), range(options.prompt), [0] * options.prompt)
    found = {"prefill": prefill, "decode": decode(1), "decode_8": decode(8)}
    return {**found, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> int:
    """Write the file if it is not there, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("layers", "hidden", "ffn", "vocab", "heads", "prompt", "new", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--type", choices=["Q4_0", "Q8_0"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only-write", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, with one thread")
    parser.add_argument("--words", action="store_true", help="with a vocabulary, for llama.cpp's server")
    options = parser.parse_args()
    shape = f"{options.layers}x{options.hidden}x{options.ffn}x{options.vocab}"
    file = options.folder / f"random-{shape}-{options.type}{'-words' if options.words else ''}.gguf"
    if not file.exists():
        write(options, file)
    if not options.only_write:
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        sys.stdout.write(json.dumps(measure(options, file)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
