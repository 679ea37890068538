"""Compare three layouts of the same training rows: real (non-pad) tokens per second and peak memory.

official   every row padded to max_source_length + max_target_length + 1, as the released script does
dynamic    rows of similar length batched together and padded to the longest of the batch (glmtune's default)
packed     rows packed end to end without seeing each other (data.packing=true)

All arms train a prefix on the same frozen model with the same rows, the same rows per optimizer step and the
same optimizer. Each measurement is a process of its own; the arms take turns, and medians are reported.

python benchmarks/make_checkpoint.py --hidden 512 --layers 6 --heads 8 --ffn 1376 --dtype float32 \
    --tokenizer TOKENIZER_MODEL --out /tmp/medium
python benchmarks/train_throughput.py --model /tmp/medium --data-dir FOLDER_WITH_ADGEN
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

ARMS = ("official", "dynamic", "packed")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of an official-format checkpoint")
    parser.add_argument("--data-dir", required=True, help="folder with ADGEN's train.json")
    parser.add_argument("--rows", type=int, default=256, help="rows trained on in one measurement")
    parser.add_argument("--rows-per-step", type=int, default=16, help="rows in one optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows in one forward pass")
    parser.add_argument("--packing-length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--packed-rows", type=int, default=2, help="packed rows in one forward pass")
    parser.add_argument("--pre-seq-len", type=int, default=128)
    parser.add_argument("--source", type=int, default=64, help="max_source_length, tokens")
    parser.add_argument("--target", type=int, default=128, help="max_target_length, tokens")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per arm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def batches(options: argparse.Namespace, arm: str, rows: Any, pad: int) -> list[list[dict[str, Any]]]:
    """Lay the rows out: for each optimizer step its list of micro-batches."""
    import torch

    from glmtune.data.collate import DynamicPaddingCollator, PackedDataset, PackingCollator
    from glmtune.labels import IGNORE_INDEX
    from glmtune.training.row_order import EpochSampler

    lengths = [len(row["input_ids"]) for row in rows]
    num_steps = options.rows // options.rows_per_step
    if arm == "packed":
        packed = PackedDataset(rows, lengths, options.packing_length)
        collate = PackingCollator(pad)
        micro = [
            collate([packed[i] for i in range(at, min(at + options.packed_rows, len(packed)))])
            for at in range(0, len(packed), options.packed_rows)
        ]
    else:
        sampler = EpochSampler(
            lengths, batch_size=options.micro_batch, group_by_length=arm == "dynamic", seed=1
        )
        order = list(sampler)
        collate = DynamicPaddingCollator(pad)
        micro = [
            collate([rows[i] for i in order[at : at + options.micro_batch]])
            for at in range(0, len(order), options.micro_batch)
        ]
    if arm == "official":
        full = options.source + options.target + 1
        for batch in micro:
            missing = full - batch["input_ids"].shape[1]
            for name, fill in (("input_ids", pad), ("labels", IGNORE_INDEX)):
                batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=fill)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for batch in micro:
        batch["labelled_only"] = arm != "official"  # as our trainer does: no logits where nothing is learnt
    return [micro[step::num_steps] for step in range(num_steps)]


def measure(options: argparse.Namespace, arm: str) -> dict[str, float]:
    """Train once over the rows and return tokens per second and peak resident memory."""
    import torch

    from glmtune.data.dataset import load_split
    from glmtune.data.settings import DataSettings
    from glmtune.loading import load_model, load_tokenizer
    from glmtune.prefix.attach import attach_prefix, freeze_base
    from glmtune.prefix.init import build_prefix_encoder
    from glmtune.prefix.settings import PrefixSettings

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.model)
    data = DataSettings(
        dir=options.data_dir,
        train_file="train.json",
        layout="adgen",
        max_source_length=options.source,
        max_target_length=options.target,
        max_train_samples=options.rows,
    )
    rows = load_split(data, "train", tokenizer).rows
    model = load_model(options.model, device="cpu")
    encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=options.pre_seq_len), tokenizer)
    attach_prefix(model, encoder)
    freeze_base(model)
    model.config.use_cache = False
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-2)
    steps = batches(options, arm, rows, tokenizer.pad_token_id)
    real_tokens = sum(len(row["input_ids"]) for row in rows)
    train_step(model, optimizer, steps[0])
    start = time.perf_counter()
    for step in steps:
        train_step(model, optimizer, step)
    seconds = time.perf_counter() - start
    computed = sum(batch["input_ids"].numel() for step in steps for batch in step)
    return {
        "tokens_per_second": real_tokens / seconds,
        "real_share": real_tokens / computed,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def train_step(model: Any, optimizer: Any, micro_batches: Sequence[dict[str, Any]]) -> None:
    """Do one optimizer step, its loss averaged over the tokens that carry loss."""
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    for batch in micro_batches:
        model(**batch, num_items_in_batch=targets).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Measure one arm, or let the arms take turns in processes of their own."""
    options = parse_arguments()
    if options.arm:
        sys.stdout.write(json.dumps(measure(options, options.arm)) + "\n")
        return
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for turn in range(options.rounds):
        for arm in ARMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[arm].append(json.loads(output.splitlines()[-1]))
            sys.stderr.write(f"round {turn + 1} {arm}: {output.splitlines()[-1]}\n")
    sys.stdout.write(f"`{' '.join(['python', *sys.argv])}`\n\n")
    sys.stdout.write(
        "| layout | real tokens/s | x official | real share | peak MiB |\n|---|---|---|---|---|\n"
    )
    for arm in ARMS:
        ratios = [
            ours["tokens_per_second"] / theirs["tokens_per_second"]
            for ours, theirs in zip(results[arm], results["official"], strict=True)
        ]
        middle = {
            name: statistics.median(result[name] for result in results[arm]) for name in results[arm][0]
        }
        sys.stdout.write(
            f"| {arm} | {middle['tokens_per_second']:.0f} | {statistics.median(ratios):.2f} "
            f"| {middle['real_share']:.0%} | {middle['peak_mib']:.0f} |\n"
        )


if __name__ == "__main__":
    main()
