"""Training on a GPU, in every type and with every lever: the losses are those of float32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glmtune.data.collate import PackedDataset, PackingCollator
from glmtune.loading import load_base
from recipes.train import COMMAND, run
from recipes.words.compose import load_settings
from tests.gpu.devices import DEVICES, on_every_device

STEPS = 4
PREFIX = (
    "+recipe=ptuning_official",
    "prefix.pre_seq_len=4",
    "prefix.dropout=0",
    "trainer.learning_rate=1e-2",
)
LORA = ("+recipe=lora", "lora.dropout=0", "trainer.learning_rate=1e-3")
FULL = ("+recipe=full", "trainer.learning_rate=1e-3")
PACKED = ("data.packing=true", "data.packing_length=96")
CASES = {
    "prefix": PREFIX,
    "prefix-int4": (*PREFIX, "model.quantization=int4"),
    "prefix-checkpointing": (*PREFIX, "trainer.gradient_checkpointing=true"),
    "lora": LORA,
    "full": FULL,
    "full-checkpointing": (*FULL, "trainer.gradient_checkpointing=true"),
    "full-packed": (*FULL, *PACKED),
    "full-fused": (*FULL, "trainer.optim=adamw_torch_fused"),
    "full-compiled": (*FULL, "trainer.torch_compile=true"),
}
PRECISIONS = {"fp32": 2e-3, "bf16": 3e-2, "fp16": 1e-2}
"""Precision → how far a loss may be from that of float32 on the CPU, as a share of it."""
LEVERS = ("-checkpointing", "-fused", "-compiled")
"""What changes no loss: such cases have the reference of the case without it, and run in bf16 only."""
CELLS = [
    pytest.param(case, precision, *device.values, marks=device.marks)
    for device in DEVICES
    for case in CASES
    for precision in PRECISIONS
    if (precision == "bf16" or not case.endswith(LEVERS))
    # The CPU has no fp16, and its fp32 is the reference.
    and (precision == "bf16" or device.values != ("cpu",))
]


def losses(
    case: str, precision: str, device: str, base: Path, rows: dict[str, Path], folder: Path
) -> list[float]:
    words = [
        *CASES[case],
        f"model.source={base}",
        f"model.device={device}",
        "model.dtype=float32",
        f"trainer.precision={precision}",
        "retention=null",
        "data=files",
        "data.layout=adgen",
        f"data.train_file={rows['train']}",
        "data.max_source_length=40",
        "data.max_target_length=55",
        f"trainer.max_steps={STEPS}",
        "trainer.logging_steps=1",
        "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=2",
        "trainer.report_to=[]",
        "seed=3",
        f"output_dir={folder}",
    ]
    run(load_settings(COMMAND, words))
    entries = map(json.loads, (folder / "trainer_log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def references() -> dict[str, list[float]]:
    """Losses on the CPU in float32, by case, as they are asked for."""
    return {}


@pytest.mark.parametrize(("case", "precision", "device"), CELLS)
def test_losses(
    case: str,
    precision: str,
    device: str,
    references: dict[str, list[float]],
    tiny_base: Path,
    tiny_rows: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cpu":  # traced, not compiled: the compiler for CPUs takes a minute
        compile_in_place = nn.Module.compile
        monkeypatch.setattr(
            nn.Module, "compile", lambda self, **how: compile_in_place(self, backend="eager", **how)
        )
    torch._dynamo.reset()
    plain = case.rpartition("-")[0] if case.endswith(LEVERS) else case
    if plain not in references:
        references[plain] = losses(plain, "fp32", "cpu", tiny_base, tiny_rows, tmp_path / "reference")
    found = losses(case, precision, device, tiny_base, tiny_rows, tmp_path / "run")
    assert len(found) == STEPS
    assert found[-1] < found[0]
    # Under fp16 a step may be left out, as the scale of the loss finds its size.
    count = 1 if precision == "fp16" else STEPS
    assert found[:count] == pytest.approx(references[plain][:count], rel=PRECISIONS[precision])


@on_every_device
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_packed_rows_do_not_see_each_other(attention: str, device: str, tiny_base: Path) -> None:
    """The logits of a sample inside a pack are those of the sample alone."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed (pip install flash-attn)")
    dtype = "bfloat16" if attention == "flash_attention_2" else "float32"
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (9, 14, 6)]
    rows = [{"input_ids": ids, "labels": ids, "length": len(ids)} for ids in samples]
    packed = PackedDataset(rows, [len(ids) for ids in samples], 32, seed=0)
    batch = PackingCollator(0)([packed[index] for index in range(len(packed))])
    model: Any = load_base(tiny_base, device=device, dtype=dtype, attn_implementation=attention)
    with torch.inference_mode():
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        together = model(**inputs, use_cache=False).logits.float().cpu()
        places = batch["position_ids"]
        num_found = 0
        for ids in samples:
            alone = (
                model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()
            )
            row, start = next(
                (row, start)
                for row in range(len(places))
                for start in range(places.shape[1] - len(ids) + 1)
                if batch["input_ids"][row, start : start + len(ids)].tolist() == ids
            )
            assert places[row, start] == 0
            limit = (2e-2 if dtype == "bfloat16" else 1e-5) * float(alone.abs().max())
            assert float((together[row, start : start + len(ids)] - alone).abs().max()) <= limit
            num_found += 1
    assert num_found == 3
