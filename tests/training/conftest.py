"""A tiny model with rows of uneven length, and a trainer around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets
import pytest
import torch

from glmtune.data.collate import DynamicPaddingCollator
from glmtune.data.rows import RowSet, TrainingRows
from glmtune.loading import load_tokenizer
from glmtune.models.load import load_official
from glmtune.models.tokenizers.base import GlmTokenizer
from glmtune.prefix.checkpoint import PrefixMeta
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings
from glmtune.quantization.layers.apply import quantize_model
from glmtune.retention.replay import Replay
from glmtune.retention.settings import RetainSettings
from glmtune.training.adapt import tune_all, tune_prefix
from glmtune.training.arguments import training_arguments
from glmtune.training.settings import TrainerSettings
from glmtune.training.trainer import GlmTrainer


@pytest.fixture
def rows() -> datasets.Dataset:
    """24 rows of 6 to 29 tokens; the loss lies on the last third of each."""
    generator = torch.Generator().manual_seed(0)
    encoded: list[dict[str, Any]] = []
    for number in range(24):
        ids = torch.randint(3, 400, (6 + number,), generator=generator).tolist()
        quiet = len(ids) * 2 // 3
        encoded.append({"input_ids": ids, "labels": [-100] * quiet + ids[quiet:], "length": len(ids)})
    return datasets.Dataset.from_list(encoded)


MakeTrainer = Callable[..., GlmTrainer]


@pytest.fixture
def make_trainer(tiny_base: Path, rows: datasets.Dataset, tmp_path: Path) -> MakeTrainer:
    """Build a trainer of a prefix (4 positions, no dropout), or of everything (`full`), from settings.

    `folder` names its run, `method` quantizes the base first, `retain` replays.
    """

    def make(
        *,
        folder: str = "run",
        full: bool = False,
        method: str | None = None,
        retain: RetainSettings | None = None,
        **values: Any,
    ) -> GlmTrainer:
        torch.manual_seed(7)
        model = load_official(tiny_base, device="cpu")
        tokenizer = cast(GlmTokenizer, load_tokenizer(tiny_base))
        if method is not None:
            quantize_model(model, method)
        if full:
            tuned = tune_all(model, tokenizer)
        else:
            encoder = build_prefix_encoder(model, PrefixSettings(pre_seq_len=4, dropout=0.0))
            tuned = tune_prefix(model, encoder, PrefixMeta())
        defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        settings = TrainerSettings(**{**defaults, "logging_steps": 1, "group_by_length": False, **values})
        accumulation = settings.gradient_accumulation_steps
        replay = retain and Replay(
            retain,
            rows_per_step=settings.per_device_train_batch_size * accumulation,
            accumulation=accumulation,
            seed=1,
            tokenizer=tokenizer,
        )
        (tmp_path / folder).mkdir(exist_ok=True)
        return GlmTrainer(
            tuned,
            training_arguments(
                settings,
                output_dir=tmp_path / folder,
                seed=1,
                device="cpu",
                autocast="no",
                evaluates=True,
            ),
            settings,
            TrainingRows(
                train=RowSet(rows, rows["length"][:]),
                validation=RowSet(rows.select(range(10)), rows["length"][:10]),
                collator=DynamicPaddingCollator(0),
            ),
            replay=replay,
        )

    return make
