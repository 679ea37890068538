"""The formulas of activations against the very tensors that autograd keeps, to the byte."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import build_model
from glmtune.models.releases.families import Family
from glmtune.planning import activations as kept
from glmtune.planning.geometry import Geometry
from glmtune.planning.workload import Batch, Sharding, Workload
from glmtune.prefix.attach import attach_prefix, freeze_base
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.prefix.settings import PrefixSettings
from glmtune.quantization.layers.apply import quantize_model
from glmtune.quantization.layers.embeddings import round_embeddings
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings

SECOND = Geometry(
    name="tiny",
    num_layers=3,
    hidden_size=96,
    mlp_size=136,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
)
FIRST = dataclasses.replace(SECOND, is_first=True, num_kv_heads=6, is_tied=True)
LENGTH, CONTEXT = 50, 21
PREFIX = PrefixSettings(pre_seq_len=10)
GATED = PrefixSettings(pre_seq_len=10, gate=True)
LORA = LoraSettings(rank=4)


def work(geometry: Geometry = SECOND, **changes) -> Workload:
    rows = changes.pop("rows", 2)
    tune = changes.get("tune", "full")
    answer = LENGTH - CONTEXT - 1
    is_padded = changes.pop("is_padded", False)
    labels = rows * answer - (5 if is_padded else 0)
    values = {
        "device": "cpu",
        "weight_bytes": 4,
        "autocast": False,
        "tune": tune,
        "prefix": PREFIX if tune == "prefix" else None,
        "lora": LORA if tune == "lora" else None,
        "method": None,
        "batch": Batch(rows=rows, length=LENGTH, num_labels=labels, is_padded=is_padded),
        "sharding": Sharding(),
        "checkpointing": False,
        "optim": "adamw_torch",
    }
    return Workload(geometry=geometry, **(values | changes))


def build(w: Workload) -> torch.nn.Module:
    g = w.geometry
    sizes = {"hidden_size": g.hidden_size, "num_layers": g.num_layers, "num_attention_heads": g.num_heads}
    if g.is_first:
        official = sizes | {
            "inner_hidden_size": g.mlp_size,
            "vocab_size": g.vocab_size,
            "max_sequence_length": 64,
        }
        special = ("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id")
        official |= {name: g.vocab_size - 4 + at for at, name in enumerate(special)} | {"pad_token_id": 3}
    else:
        official = sizes | {
            "ffn_hidden_size": g.mlp_size,
            "kv_channels": g.head_dim,
            "multi_query_attention": True,
            "multi_query_group_num": g.num_kv_heads,
            "padded_vocab_size": g.vocab_size,
            "seq_length": 64,
            "add_qkv_bias": True,
        }
    config = native_config(official, Family.CHATGLM if g.is_first else Family.CHATGLM2)
    config._attn_implementation = w.attention
    torch.manual_seed(0)
    model = build_model(config).to(torch.float32 if w.weight_bytes == 4 else torch.bfloat16)
    if w.method is not None:
        quantize_model(model, w.method)
    if w.embeddings is not None:
        round_embeddings(model)
    if w.prefix is not None:
        encoder = PrefixEncoder(
            prefix_shape(config),
            pre_seq_len=w.prefix.pre_seq_len,
            hidden_size=g.hidden_size if w.prefix.prefix_projection else None,
            num_gates=g.num_heads if w.prefix.gate else None,
            embedding_width=g.hidden_size if g.is_first else None,
            dropout=w.prefix.dropout,
        )
        attach_prefix(model, encoder)
        freeze_base(model)
    elif w.lora is not None:
        model = tune_adapter(model, w.lora).model
    model.config.use_cache = False
    if w.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batch_of(w: Workload) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, w.geometry.vocab_size - 8, (w.batch.rows, LENGTH))
    if w.geometry.is_first:
        ids[:, CONTEXT - 1], ids[:, CONTEXT] = w.geometry.vocab_size - 3, w.geometry.vocab_size - 2
    labels = ids.clone()
    labels[:, : CONTEXT + 1] = -100
    mask = torch.ones_like(ids)
    if w.batch.is_padded:
        mask[-1, -5:], labels[-1, -5:] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@contextlib.contextmanager
def saved_storages(model: torch.nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Every distinct storage that autograd keeps, apart from the model's own."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def measured_bytes(w: Workload, *, compiled: bool = False) -> int:
    """Bytes that autograd keeps between forward and backward pass."""
    model = build(w)
    if compiled:  # as `torch.compile` divides a layer into forward and backward, without generating code
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True, backend="aot_eager_decomp_partition")
    autocast = torch.autocast("cpu", torch.bfloat16) if w.autocast else contextlib.nullcontext()
    with saved_storages(model) as found, autocast:
        model(**batch_of(w), labelled_only=True)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def expected_bytes(w: Workload) -> float:
    """The same by the formulas, with the small things beside them."""
    blocks = w.geometry.num_layers
    if w.checkpointing:
        inside = blocks * kept.checkpoint_bytes(w)
    else:
        inside = kept.block_bytes(w, is_lowest=True) + (blocks - 1) * kept.block_bytes(w)
    total = inside + kept.prefix_bytes(w) + kept.head_bytes(w) + small_bytes(w)
    if w.is_full:  # the head's input, of whole multiples of 256 rows; `head_bytes` counts the labels
        total += (256 - w.batch.num_labels) * w.geometry.hidden_size * w.compute_bytes
    if w.autocast:
        linear = 2 * (blocks * w.geometry.block_linear_size + w.geometry.embedding_size)
        total += linear
    return total + 4 * w.batch.num_labels * w.geometry.vocab_size  # log-softmax


def small_bytes(w: Workload) -> float:
    """Indices, positions and rotary tables, which the formulas leave out."""
    labels = w.batch.rows * (LENGTH - 1) + 8 * w.batch.num_labels + 4
    ids = 8 * w.batch.num_tokens if w.is_full else 0
    prefix = 8 * w.prefix_length
    if w.is_gated:  # layers' numbers; the gates themselves, which blocks that are computed again do not keep
        prefix += w.geometry.num_layers * (8 + (4 * w.geometry.num_heads if w.checkpointing else 0))
    width = w.geometry.head_dim
    rotary = 2 * w.residual_bytes * w.batch.num_tokens * width if w.geometry.is_first else 0
    return labels + ids + prefix + (0 if w.checkpointing else rotary)


CASES = {
    "full": work(),
    "full, padded": work(is_padded=True),
    "full, one row": work(rows=1),
    "full, autocast": work(autocast=True, is_padded=True),
    "full, eager": work(attention="eager", is_padded=True),
    "full, autocast, eager": work(attention="eager", autocast=True),
    "full, checkpointing": work(checkpointing=True, is_padded=True),
    "prefix": work(tune="prefix"),
    "prefix, padded": work(tune="prefix", is_padded=True),
    "prefix, bf16": work(tune="prefix", weight_bytes=2),
    "prefix, bf16, padded": work(tune="prefix", weight_bytes=2, is_padded=True),
    "prefix, projection": work(
        tune="prefix", prefix=PrefixSettings(pre_seq_len=10, prefix_projection=True), is_padded=True
    ),
    "prefix, no dropout": work(tune="prefix", prefix=PrefixSettings(pre_seq_len=10, dropout=0.0)),
    "prefix, int4": work(tune="prefix", weight_bytes=2, method="int4", is_padded=True),
    "prefix, int8": work(tune="prefix", method="int8"),
    "prefix, int4-e8": work(tune="prefix", weight_bytes=2, method="int4", embeddings="int8", is_padded=True),
    "prefix, int8 head": work(tune="prefix", embeddings="int8"),
    "prefix, checkpointing": work(tune="prefix", checkpointing=True, is_padded=True),
    "gated": work(tune="prefix", prefix=GATED),
    "gated, padded": work(tune="prefix", prefix=GATED, is_padded=True),
    "gated, bf16, padded": work(tune="prefix", prefix=GATED, weight_bytes=2, is_padded=True),
    "gated, projection": work(
        tune="prefix", prefix=PrefixSettings(pre_seq_len=10, prefix_projection=True, gate=True)
    ),
    "gated, int8": work(tune="prefix", prefix=GATED, method="int8"),
    "gated, checkpointing": work(tune="prefix", prefix=GATED, checkpointing=True, is_padded=True),
    "lora": work(tune="lora", is_padded=True),
    "lora, bf16": work(tune="lora", weight_bytes=2),
    "lora, wide": work(tune="lora", lora=LoraSettings(rank=4, targets=["q_proj", "o_proj", "down_proj"])),
    "lora, checkpointing": work(tune="lora", checkpointing=True),
    "lora, int4-e8": work(tune="lora", method="int4", embeddings="int8"),
    "first, full": work(FIRST),
    "first, full, padded": work(FIRST, is_padded=True),
    "first, full, autocast": work(FIRST, autocast=True),
    "first, prefix": work(FIRST, tune="prefix", rows=1),
    "first, prefix, padded": work(FIRST, tune="prefix", is_padded=True),
    "first, prefix, projection": work(
        FIRST, tune="prefix", prefix=PrefixSettings(pre_seq_len=10, prefix_projection=True), is_padded=True
    ),
    "first, prefix, int4-e8": work(FIRST, tune="prefix", method="int4", embeddings="int8", is_padded=True),
    "first, gated": work(FIRST, tune="prefix", prefix=GATED, rows=1),
    "first, gated, padded": work(FIRST, tune="prefix", prefix=GATED, is_padded=True),
    "first, lora": work(FIRST, tune="lora", is_padded=True),
    "first, checkpointing": work(FIRST, checkpointing=True),
}


@pytest.mark.parametrize("name", CASES)
def test_saved_bytes(name: str) -> None:
    assert measured_bytes(CASES[name]) == expected_bytes(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "w",
    [
        work(),
        work(tune="lora"),
        work(autocast=True),
        work(is_padded=True),
        work(FIRST),
        work(attention="eager"),
    ],
)
def test_compiled_layers_keep_no_more(w: Workload) -> None:
    assert measured_bytes(w, compiled=True) <= measured_bytes(w)
