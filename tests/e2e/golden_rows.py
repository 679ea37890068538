"""Train a tiny model of the oracles on their own batches, as one of the processes of a run under ZeRO."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import Sampler

KEYS = ("input_ids", "labels")


class Alternating(Sampler[int]):
    """The rows of batch 0 in even epochs, those of batch 1 in odd ones."""

    def __init__(self, batch_size: int, rows: int) -> None:
        self.batch_size = batch_size
        self._rows = rows
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        start = self._epoch % 2 * self._rows
        return iter(range(start, start + self._rows))


def rows_of(folder: Path) -> list[dict[str, list[int]]]:
    """The rows of both batches, one after the other, padding included as the official script has it."""
    tensors = load_file(folder / "finetune.safetensors")
    batches = [{key: tensors[f"train_batch.{number}.{key}"].tolist() for key in KEYS} for number in range(2)]
    return [
        dict(zip(KEYS, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True)
    ]


def train(folder: Path, source: Path, stage: int, output_dir: Path) -> int:
    """Make the 20 steps of `full.train20`, each of 3 rows: two for one process, one for the other.

    Args:
        folder: of the oracles, of one model.
        source: its checkpoint.
        stage: of ZeRO.
        output_dir: the run folder.
    """
    from glmtune.data.collate import DynamicPaddingCollator
    from glmtune.data.rows import RowSet, TrainingRows
    from glmtune.models.load import load_official
    from glmtune.training import session
    from glmtune.training.adapt import tune_all
    from glmtune.training.arguments import training_arguments
    from glmtune.training.callbacks import Flow
    from glmtune.training.distributed import collectives, deepspeed_engine, deepspeed_settings
    from glmtune.training.settings import TrainerSettings
    from glmtune.training.trainer import GlmTrainer

    cases = json.loads((folder / "finetune.json").read_text())["cases"]
    optimizer = cases["full.train20"]["values"]["optimizer"]
    settings = TrainerSettings(
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=optimizer["lr"],
        lr_scheduler_type="constant",
        weight_decay=optimizer["weight_decay"],
        adam_beta1=optimizer["betas"][0],
        adam_beta2=optimizer["betas"][1],
        adam_epsilon=optimizer["eps"],
        max_grad_norm=0.0,
        logging_steps=1,
    )
    zero = deepspeed_settings.DeepSpeedSettings(stage=stage)
    deepspeed_engine.prepare(zero, "cpu")
    collectives.init_processes(torch.device("cpu"), 60)
    output_dir.mkdir(exist_ok=True)
    rows = rows_of(folder)
    trainer = GlmTrainer(
        tune_all(load_official(source, dtype="float32", device="cpu"), _NoTokenizer()),
        training_arguments(
            settings,
            output_dir=output_dir,
            seed=1,
            device="cpu",
            autocast="no",
            evaluates=False,
            deepspeed=deepspeed_settings.deepspeed_config(zero, settings, precision="no", has_gpu=False),
        ),
        settings,
        TrainingRows(
            train=RowSet(rows, [len(row["labels"]) for row in rows]),  # type: ignore[arg-type]
            validation=None,
            collator=DynamicPaddingCollator(0),
        ),
    )
    # The oracles decay every weight; transformers leaves biases and norms out.
    trainer.get_decay_parameter_names = lambda model: [name for name, _ in model.named_parameters()]  # type: ignore[method-assign]
    order = Alternating(4, len(rows) // 2)
    trainer._train_sampler = order  # type: ignore[assignment]
    trainer.add_callback(Flow(begin=lambda: None, set_epoch=order.set_epoch))
    session.train(trainer, None, tensorboard=False)
    return 0


class _NoTokenizer:
    """The models of the oracles have none."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        return None
