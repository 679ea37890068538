"""Measure what each lever of memory and speed does: real tokens per second and peak memory of full tuning.

Seconds are those of the processor, one thread, so that other jobs beside it count little. Every measurement
is a child forked from one process that has imported everything, so its peak is its own; the levers take
turns, and medians are reported. Memory is the peak beyond what the process held before the model. Figures are
added to a file as they are made, and a later call adds to them.

    OMP_NUM_THREADS=1 python benchmarks/training_levers.py --out short.jsonl
    OMP_NUM_THREADS=1 python benchmarks/training_levers.py --out long.jsonl --levers long_labels long
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from forked import in_child
from torch import Tensor, nn

from glmtune.data.collate import DynamicPaddingCollator, PackedDataset, PackingCollator
from glmtune.labels import IGNORE_INDEX
from glmtune.models.architectures import chunked_loss
from glmtune.models.architectures.compiling import compile_layers
from glmtune.models.checkpoints.config import native_config
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.releases.families import Family
from glmtune.training.row_order import EpochSampler

LONG = 8192


@dataclass(frozen=True)
class Lever:
    """One way to train; each differs from the lever named by one thing.

    Attributes:
        title: for the table.
        logits: ``all`` (of every token), ``labels`` (all labels at once) or ``chunks`` (glmtune's default).
        packed: samples end to end in rows of 512 tokens, instead of padded beside each other.
        checkpointed: activations are formed again in the backward pass.
        optimizer: ``adamw``, ``fused`` or ``8bit`` (bitsandbytes).
        compiled: layers through `torch.compile`.
        autocast: bfloat16 arithmetic.
        long: one row of 8,192 tokens, a quarter of them labels.
    """

    title: str
    logits: str = "chunks"
    packed: bool = False
    checkpointed: bool = False
    optimizer: str = "adamw"
    compiled: bool = False
    autocast: bool = False
    long: bool = False


LEVERS = {
    "all": Lever("logits of every token", logits="all"),
    "labels": Lever("logits of all labels at once", logits="labels"),
    "default": Lever("logits of labels, in chunks (default)"),
    "packed": Lever("+ packing", packed=True),
    "checkpointed": Lever("+ gradient checkpointing", checkpointed=True),
    "fused": Lever("+ fused AdamW", optimizer="fused"),
    "8bit": Lever("+ 8-bit AdamW (bitsandbytes)", optimizer="8bit"),
    "bf16": Lever("+ bf16 autocast", autocast=True),
    "compiled": Lever("+ torch.compile", compiled=True),
    "long": Lever("8,192 tokens", long=True),
    "long_checkpointed": Lever("8,192 tokens, gradient checkpointing", long=True, checkpointed=True),
    "long_labels": Lever("8,192 tokens, logits of all labels at once", long=True, logits="labels"),
    "long_all": Lever("8,192 tokens, logits of every token", long=True, logits="all"),
}
SHORT = [name for name, lever in LEVERS.items() if not lever.long]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=SHORT)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per lever")
    parser.add_argument(
        "--steps", type=int, default=2, help="timed steps of a measurement, after one untimed"
    )
    parser.add_argument("--rows", type=int, default=12, help="samples of a step, 32 to 256 tokens each")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=65024)
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> OfficialGlmForCausalLM:
    """Make a random ChatGLM2 of the size asked for, float32."""
    official = {
        "model_type": "chatglm",
        "num_layers": options.layers,
        "hidden_size": options.hidden,
        "ffn_hidden_size": options.hidden * 3,
        "kv_channels": 32,
        "num_attention_heads": options.hidden // 32,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "padded_vocab_size": options.vocab,
        "seq_length": LONG,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    torch.manual_seed(0)
    return OfficialGlmForCausalLM(native_config(official, Family.CHATGLM2)).train()


def make_batches(options: argparse.Namespace, lever: Lever) -> tuple[list[dict[str, Tensor]], int]:
    """Lay out the rows as the lever wants; return one batch per step and the real tokens of each."""
    generator = torch.Generator().manual_seed(1)
    count = 1 if lever.long else options.rows
    lengths = [LONG] if lever.long else torch.randint(32, 257, (count,), generator=generator).tolist()
    rows = []
    for length in lengths:
        ids = torch.randint(3, options.vocab, (length,), generator=generator).tolist()
        quiet = length * (3 if lever.long else 2) // (4 if lever.long else 5)
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * quiet + ids[quiet:]})
    if lever.packed:
        packed = PackedDataset(rows, lengths, 512)
        batch = PackingCollator(0)([packed[index] for index in range(len(packed))])
    else:
        order = EpochSampler(lengths, batch_size=count, group_by_length=True, seed=1)
        batch = DynamicPaddingCollator(0)([rows[index] for index in order])
    return [batch] * (options.steps + 1), sum(lengths)


def make_optimizer(lever: Lever, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make AdamW in the form the lever names."""
    if lever.optimizer == "8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW(weights, lr=1e-4, optim_bits=8)
    return torch.optim.AdamW(weights, lr=1e-4, fused=lever.optimizer == "fused")


def measure(options: argparse.Namespace, lever: Lever) -> dict[str, float]:
    """Train some steps and return tokens per second and the peak beyond the start, MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if lever.logits == "labels":
        chunked_loss.LOGITS_PER_CHUNK = 2**62
    model = make_model(options)
    if lever.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lever.compiled:
        compile_layers(model)
    optimizer = make_optimizer(lever, list(model.parameters()))
    batches, tokens = make_batches(options, lever)
    start, loss = 0.0, torch.zeros(())
    for number, batch in enumerate(batches):
        if number == 1:
            start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=lever.autocast):
            loss = model(**batch, labelled_only=lever.logits != "all", use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens_per_second": tokens * options.steps / seconds,
        "peak_mib": (peak - before) / 1024,
        "loss": float(loss.detach()),
    }


def main() -> None:
    """Let the levers take turns, and print a table."""
    options = parse_arguments()
    torch.set_num_threads(1)
    if any(LEVERS[name].optimizer == "8bit" for name in options.levers) and find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  # so that its import is in no measurement
    names = [name for name in options.levers if LEVERS[name].optimizer != "8bit" or find_spec("bitsandbytes")]
    for turn in range(options.rounds):
        for name in names:
            found = in_child(lambda name=name: measure(options, LEVERS[name]))
            with options.out.open("a") as file:
                file.write(json.dumps({"lever": name, **found}) + "\n")
            sys.stderr.write(f"round {turn + 1} {name}: {json.dumps(found)}\n")
    lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    results = {name: [line for line in lines if line["lever"] == name] for name in LEVERS}
    trained = sum(weight.numel() for weight in make_model(options).parameters())
    sys.stdout.write(f"{trained / 1e6:.1f} million parameters\n\n")
    sys.stdout.write("| lever | real tokens/s | peak MiB | loss |\n|---|---|---|---|\n")
    for name in [name for name in LEVERS if results[name]]:
        keys = [key for key in results[name][0] if key != "lever"]
        middle = {key: statistics.median(found[key] for found in results[name]) for key in keys}
        sys.stdout.write(
            f"| {LEVERS[name].title} | {middle['tokens_per_second']:.0f} | {middle['peak_mib']:,.0f} "
            f"| {middle['loss']:.4f} |\n"
        )


if __name__ == "__main__":
    main()
