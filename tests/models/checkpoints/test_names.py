from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GlmConfig

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.config import native_config, official_config
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.checkpoints.names import (
    FusedLayout,
    fuse,
    is_derived,
    name_table,
    split_fused,
    state_to_native,
)
from glmtune.models.checkpoints.writing import official_tensors
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.releases.families import Family

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("rest", [(), (5,)])
def test_fuse_undoes_split(per_head: bool, rest: tuple[int, ...]) -> None:
    layout = FusedLayout(num_heads=4, num_kv_heads=4 if per_head else 2, head_dim=3, per_head=per_head)
    fused = torch.randn(sum(layout.rows), *rest)
    parts = split_fused(fused, layout)
    assert tuple(len(part) for part in parts) == layout.rows
    assert torch.equal(fuse(*parts, layout), fused)


def test_rows_of_the_two_layouts() -> None:
    rows = torch.arange(12)
    grouped = FusedLayout(num_heads=4, num_kv_heads=1, head_dim=2, per_head=False)
    assert [part.tolist() for part in split_fused(rows, grouped)] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9],
        [10, 11],
    ]
    per_head = FusedLayout(num_heads=2, num_kv_heads=2, head_dim=2, per_head=True)
    assert [part.tolist() for part in split_fused(rows, per_head)] == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
    ]


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "per-head"])
def test_the_table_covers_the_model_and_the_file(name: str) -> None:
    folder = GOLDEN / name
    config = native_config(read_config(folder), Family.CHATGLM2)
    table = name_table(config)
    with torch.device("meta"):
        model = OfficialGlmForCausalLM(config)
    native = [target for entry in table for target in entry.native]
    assert sorted(native) == sorted(dict(model.named_parameters()))
    stored = {
        key: value for file in folder.glob("model-*.safetensors") for key, value in load_file(file).items()
    }
    assert {entry.official: entry.shape for entry in table} == {
        key: tuple(value.shape) for key, value in stored.items() if not is_derived(key)
    }
    round_trip = official_tensors(state_to_native(stored, config), config)
    assert round_trip.keys() == stored.keys() - {"transformer.rotary_pos_emb.inv_freq"}
    assert all(torch.equal(round_trip[key], stored[key]) for key in round_trip)


def test_foreign_names() -> None:
    config = native_config(read_config(GOLDEN / "chatglm2"), Family.CHATGLM2)
    with pytest.raises(CheckpointError, match=r"not part of the model: classifier_head\.weight"):
        state_to_native({"classifier_head.weight": torch.zeros(1)}, config)


def test_the_order_of_fused_rows_is_not_guessed_at() -> None:
    config = GlmConfig()  # as transformers makes it, without our attributes
    words = (
        r"GlmConfig does not say how the rows of query_key_value are ordered.*`fused_per_head`.*native_config"
    )
    for read in (FusedLayout.of, name_table, lambda config: official_config(config, Family.GLM4)):
        with pytest.raises(CheckpointError, match=words):
            read(config)
    config.fused_per_head = False
    assert not FusedLayout.of(config).per_head
