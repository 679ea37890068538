"""Examples and their batches, and the figures of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glmtune.data.dataset import EncodedSplit, load_split
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX
from glmtune.preference.figures import preference_figures
from glmtune.preference.rows import PreferenceCollator, PreferenceRows, preference_set
from glmtune.preference.settings import PreferenceSettings
from glmtune.training.rank_batches import FilledRows, filler

DPO, KTO = PreferenceSettings(), PreferenceSettings(loss="kto")
QUESTIONS = (
    "你好，今天想去哪里？",
    "晚上睡不着怎么办？",
    "How many apples are left?",
    "写一段广告。",
    "Hi",
    "Which?",
)


def split_of(folder: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> EncodedSplit:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_split(DataSettings(layout="preference", train_file=str(file)), "train", tokenizer)


@pytest.fixture
def pairs(tmp_path: Path, tiny_tokenizer: Any) -> EncodedSplit:
    rows = [
        {"prompt": question, "chosen": f"yes {place}", "rejected": "no " * (place + 1)}
        for place, question in enumerate(QUESTIONS)
    ]
    return split_of(tmp_path, tiny_tokenizer, rows)


@pytest.fixture
def judged(tmp_path: Path, tiny_tokenizer: Any) -> EncodedSplit:
    rows = [
        {"prompt": question, "completion": f"yes {place}", "label": place % 3 > 0}
        for place, question in enumerate(QUESTIONS)
    ]
    return split_of(tmp_path, tiny_tokenizer, rows)


def parts(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Return prompt and answer of encoded tokens."""
    start = next(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    return row["input_ids"][:start], row["input_ids"][start:]


def test_a_pair_is_one_example(pairs: EncodedSplit) -> None:
    rows = PreferenceRows(pairs, DPO)
    assert (len(rows), rows.are_paired, rows.desirable.tolist()) == (6, True, [True] * 6)
    for index in range(6):
        example = rows[index]
        first, second = pairs.rows[2 * index], pairs.rows[2 * index + 1]
        assert example["input_ids"] == first["input_ids"] + second["input_ids"]
        assert example["labels"] == first["labels"] + second["labels"]
        assert (example["first_length"], rows.lengths[index]) == (
            len(first["labels"]),
            len(example["labels"]),
        )


def test_both_rows_of_an_example_are_in_one_batch(pairs: EncodedSplit) -> None:
    rows = PreferenceRows(pairs, DPO)
    rows.reference = np.arange(12, dtype=np.float32).reshape(6, 2)
    batch = PreferenceCollator(0, 8)([rows[4], rows[1]])
    assert batch["input_ids"].shape[0] == 4
    assert batch["input_ids"].shape[1] % 8 == 0
    for place, row in enumerate((8, 2, 9, 3)):  # better ones first
        ids = pairs.rows[row]["input_ids"]
        assert batch["input_ids"][place].tolist() == ids + [0] * (batch["input_ids"].shape[1] - len(ids))
        assert batch["attention_mask"][place].sum() == len(ids)
    assert batch["examples"].tolist() == [4, 1]
    assert batch["reference"].view(torch.float32).tolist() == [[8.0, 2.0], [9.0, 3.0]]


def test_a_filler_has_no_label(pairs: EncodedSplit) -> None:
    rows = FilledRows(PreferenceRows(pairs, DPO))
    batch = PreferenceCollator(0)([rows[filler(2)]])
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert batch["attention_mask"].any(dim=1).all()


def test_a_judged_answer_has_a_mismatched_one_beside_it(judged: EncodedSplit) -> None:
    rows = PreferenceRows(judged, KTO)
    assert (len(rows), rows.are_paired) == (6, False)
    assert rows.desirable.tolist() == [False, True, True] * 2
    for index in range(6):
        example = rows[index]
        length = example["first_length"]
        own, other = (
            parts({name: example[name][cut] for name in ("input_ids", "labels")})
            for cut in (slice(length), slice(length, None))
        )
        assert own == parts(judged.rows[index])
        assert other[0] == own[0]
        assert other[1] != own[1]
        assert other[1] in [parts(judged.rows[place])[1] for place in range(6)]


def test_a_pair_is_two_judged_answers(pairs: EncodedSplit) -> None:
    found = preference_set(pairs, KTO)
    rows = PreferenceRows(pairs, KTO)
    assert (len(rows), rows.are_paired, rows.desirable.tolist()) == (12, True, [True, False] * 6)
    assert found.samples([0, 1, 7]) == [0, 0, 3]  # as users count them
    for index in range(12):
        example = rows[index]
        second = parts({name: example[name][example["first_length"] :] for name in ("input_ids", "labels")})
        assert second[1] not in (parts(pairs.rows[index // 2 * 2 + side])[1] for side in (0, 1))


def test_rows_that_a_loss_cannot_use(judged: EncodedSplit, tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"`preference.loss` is `dpo`.*one that is judged.*\+recipe=kto"):
        PreferenceRows(judged, DPO)
    few = split_of(tmp_path, tiny_tokenizer, [{"prompt": "a", "completion": "b", "label": True}] * 2)
    with pytest.raises(ConfigError, match=r"has 2 rows, but `preference.loss` is `kto`"):
        PreferenceRows(few, KTO)


# ---- figures


def test_figures_of_pairs(pairs: EncodedSplit) -> None:
    rows = PreferenceRows(pairs, DPO)
    policy = torch.tensor(
        [[-10.0, -12.0], [-8.0, -9.0], [-5.0, -20.0], [-7.0, -7.0], [-6.0, -4.0], [-3.0, -3.0]]
    )
    reference = torch.full((6, 2), -10.0)
    tokens = torch.tensor([[4, 4]] * 6)
    values = torch.cat([policy, reference, tokens], dim=1).double()
    found = preference_figures(values, rows, PreferenceSettings(beta=0.5))
    margins = 0.5 * (policy[:, 0] - policy[:, 1])
    assert found["rewards/margins"] == pytest.approx(float(margins.mean()))
    assert found["rewards/chosen"] == pytest.approx(float(0.5 * (policy[:, 0] + 10).mean()))
    assert found["accuracy"] == found["rewards/accuracies"] == pytest.approx(4 / 6)  # two ties, one wrong
    assert found["loss"] == pytest.approx(float(torch.nn.functional.softplus(-margins).mean()), rel=1e-6)
    assert found["nll"] == pytest.approx(39 / 24)
    assert found["rewards/margins_low"] < found["rewards/margins"] < found["rewards/margins_high"]
    assert 0 < found["rewards/accuracies_low"] < 4 / 6 < found["rewards/accuracies_high"] <= 1
    more = preference_figures(values, rows, PreferenceSettings(beta=0.5, sft_weight=2.0))
    assert more["loss"] == pytest.approx(found["loss"] + 2 * 39 / 24)
    assert more["rewards/margins_low"] == found["rewards/margins_low"], "the same draws every time"


def test_figures_of_judged_answers(judged: EncodedSplit) -> None:
    rows = PreferenceRows(judged, KTO)
    policy = torch.tensor([[-10.0, -3.0], [-8.0, -3.0], [-5.0, -3.0]] * 2)
    values = torch.cat([policy, torch.full((6, 2), -7.0), torch.full((6, 2), 5.0)], dim=1).double()
    found = preference_figures(values, rows, PreferenceSettings(loss="kto", beta=0.5))
    assert found["rewards/rejected"] == pytest.approx(-1.5)  # rows 0 and 3
    assert found["rewards/chosen"] == pytest.approx((-0.5 + 1) / 2)
    assert found["rewards/margins"] == pytest.approx(0.25 + 1.5)
    assert found["accuracy"] == pytest.approx(4 / 6)  # -8 should have become likelier
    assert found["kl"] == pytest.approx(4.0)
    assert found["tokens"] == 30
