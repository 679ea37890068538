"""Write an official-format checkpoint of random weights, shard by shard, for measurements on real shapes.

The defaults are ChatGLM2-6B's shape, with `--family chatglm` ChatGLM-6B's (12.5 and 13.4 GB in bfloat16):

    python benchmarks/make_checkpoint.py --out /tmp/chatglm2-6b-random
    python benchmarks/make_checkpoint.py --family chatglm --out /tmp/chatglm-6b-random
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glmtune.models.checkpoints.config import native_config, official_config
from glmtune.models.checkpoints.names import name_table
from glmtune.models.releases.families import Family

SHARD_BYTES = 1_900_000_000


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--family", default="chatglm2", choices=[family.value for family in Family])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, help="width of the MLP")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, help="rows of the embedding")
    parser.add_argument("--seq-length", type=int, help="positions")
    parser.add_argument("--rope-ratio", type=float, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--format", default="bin", choices=["bin", "safetensors"])
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer file or folder of files to copy next to the weights"
    )
    return parser.parse_args(arguments)


def official_values(options: argparse.Namespace) -> dict[str, object]:
    """Build config.json's content (ChatGLM-6B has no `--kv-heads`, `--head-dim` and `--rope-ratio`)."""
    family = Family(options.family)
    values: dict[str, object] = {
        "hidden_size": options.hidden,
        "num_layers": options.layers,
        "num_attention_heads": options.heads,
        "torch_dtype": options.dtype,
    }
    if family is Family.CHATGLM:
        values |= {
            "inner_hidden_size": options.ffn or 16384,
            "vocab_size": options.vocab or 130528,
            "max_sequence_length": options.seq_length or 2048,
        }
    else:
        values |= {
            "ffn_hidden_size": options.ffn or 13696,
            "kv_channels": options.head_dim,
            "multi_query_attention": True,
            "multi_query_group_num": options.kv_heads,
            "padded_vocab_size": options.vocab or 65024,
            "seq_length": options.seq_length or 32768,
            "rope_ratio": options.rope_ratio,
            "add_qkv_bias": True,
        }
    return official_config(native_config(values, family), family)


def shards(options: argparse.Namespace, official: dict[str, object]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one file after the other."""
    dtype, generator = getattr(torch, options.dtype), torch.Generator().manual_seed(options.seed)
    shard: dict[str, Tensor] = {}
    used, embedding = 0, torch.empty(0)
    for entry in name_table(native_config(official, Family(options.family))):
        tensor = torch.empty(entry.shape, dtype=dtype)
        if "layernorm" in entry.official and entry.official.endswith("weight"):
            tensor.fill_(1)
        elif entry.is_copy:
            tensor.copy_(embedding)
        else:
            tensor.normal_(std=options.std, generator=generator)
        embedding = tensor if entry.official.endswith("word_embeddings.weight") else embedding
        if shard and used + tensor.nbytes > options.shard_bytes:
            yield shard
            shard, used = {}, 0
        shard[entry.official] = tensor
        used += tensor.nbytes
    yield shard


def write(options: argparse.Namespace) -> Path:
    """Write the checkpoint and return its folder."""
    official = official_values(options)
    options.out.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("pytorch_model", "bin") if options.format == "bin" else ("model", "safetensors")
    files: list[tuple[Path, list[str]]] = []
    total = 0
    for number, shard in enumerate(shards(options, official), start=1):
        file = options.out / f"{stem}-{number:05d}.partial"
        torch.save(shard, file) if options.format == "bin" else save_file(
            shard, file, metadata={"format": "pt"}
        )
        files.append((file, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
        del shard
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(files, start=1):
        single = len(files) == 1
        name = f"{stem}.{suffix}" if single else f"{stem}-{number:05d}-of-{len(files):05d}.{suffix}"
        file.rename(options.out / name)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (options.out / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))
    (options.out / "config.json").write_text(json.dumps(official, indent=2))
    if options.tokenizer is not None:
        is_folder = options.tokenizer.is_dir()
        for file in options.tokenizer.iterdir() if is_folder else [options.tokenizer]:
            shutil.copy(file, options.out / file.name)
    return options.out


if __name__ == "__main__":
    write(parse_arguments())
