"""Batches are padded to their own length, and packed samples cannot see each other."""

from __future__ import annotations

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

from glmtune.data.collate import (
    IGNORE_INDEX,
    DynamicPaddingCollator,
    PackedDataset,
    PackingCollator,
    pack_lengths,
)
from glmtune.errors import ConfigError


def samples(lengths: list[int], prompt: int = 2) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "length": length})
    return rows


def test_padding_goes_to_the_longest_of_the_batch() -> None:
    batch = DynamicPaddingCollator(pad_token_id=7)(samples([3, 5]))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (2, 5)
    )
    assert batch["input_ids"][0, 3:].tolist() == [7, 7]
    assert batch["labels"][0, 3:].tolist() == [IGNORE_INDEX] * 2
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_padded_length_can_be_rounded_up() -> None:
    assert DynamicPaddingCollator(0, pad_to_multiple_of=8)(samples([3, 9]))["input_ids"].shape == (2, 16)
    assert DynamicPaddingCollator(0, pad_to_multiple_of=8)(samples([8]))["input_ids"].shape == (1, 8)


def test_packing_is_complete_tight_and_repeatable() -> None:
    lengths = torch.randint(20, 190, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = pack_lengths(lengths, 512, seed=3)
    assert sorted(index for pack in packs for index in pack) == list(range(2000))
    assert max(sum(lengths[index] for index in pack) for pack in packs) <= 512
    assert sum(lengths) / (512 * len(packs)) > 0.97
    assert pack_lengths(lengths, 512, seed=3) == packs != pack_lengths(lengths, 512, seed=4)
    assert pack_lengths([], 512) == []
    assert pack_lengths([512, 512], 512) in ([[0], [1]], [[1], [0]])


def test_a_sample_longer_than_a_packed_row_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"`data.packing_length` is 10, but sample 1 has 11 tokens.*at least 11"
    ):
        pack_lengths([3, 11], 10)


def test_packed_rows_restart_positions_and_predict_nothing_across_borders() -> None:
    rows = samples([4, 3, 5], prompt=0)
    packed = PackedDataset(rows, [4, 3, 5], 8, seed=0)
    assert len(packed) == 2
    assert packed.lengths == [len(packed[0]["input_ids"]), len(packed[1]["input_ids"])]
    for number, pack in enumerate(packed.packs):
        row = packed[number]
        assert row["input_ids"] == [token for index in pack for token in rows[index]["input_ids"]]
        assert row["position_ids"] == [place for index in pack for place in range(rows[index]["length"])]
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        assert [row["labels"][start] for start in starts] == [IGNORE_INDEX] * len(pack)
        assert row["labels"].count(IGNORE_INDEX) == len(pack)


@pytest.fixture(scope="module")
def model() -> GlmForCausalLM:
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=2, attention_bias=True,
    )  # fmt: skip
    return GlmForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_cannot_see_each_other(model: GlmForCausalLM, attention: str) -> None:
    lengths = [9, 4, 12, 7, 5, 3, 11, 6]
    rows = samples(lengths)
    packed = PackedDataset(rows, lengths, 24, seed=1)
    batch = PackingCollator(pad_token_id=0, pad_to_multiple_of=4)(list(packed))
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape[0] == len(packed)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        together = model(**batch, use_cache=False)
        alone = {
            index: model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            for index, row in enumerate(rows)
        }
    logits = together.logits.flatten(0, 1)
    ids = batch["input_ids"].flatten()
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    found = 0
    for start in starts:
        for index, row in enumerate(rows):
            end = start + row["length"]
            if ids[start:end].tolist() == row["input_ids"]:
                torch.testing.assert_close(logits[start:end], alone[index], atol=2e-6, rtol=1e-5)
                found += 1
    assert found == len(rows)


def test_packed_and_padded_losses_are_equal(model: GlmForCausalLM) -> None:
    lengths = [9, 4, 12, 7]
    rows = samples(lengths)
    packed = PackingCollator(0)(list(PackedDataset(rows, lengths, 16, seed=0)))
    padded = DynamicPaddingCollator(0)(rows)
    assert (packed["labels"] != IGNORE_INDEX).sum() == (padded["labels"] != IGNORE_INDEX).sum()
    with torch.no_grad():
        losses = [model(**batch, use_cache=False).loss for batch in (packed, padded)]
    torch.testing.assert_close(losses[0], losses[1], atol=2e-6, rtol=0)
