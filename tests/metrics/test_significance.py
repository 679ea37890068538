"""The paired bootstrap finds what is there and nothing else."""

from __future__ import annotations

import random

from glmtune.metrics.significance import paired_bootstrap
from glmtune.metrics.text import METRICS, score_row

WORDS = ["这条", "裤子", "版型", "宽松", "穿着", "舒适", "显瘦", "百搭", "面料", "柔软", "，", "。"]


def runs(noise_a: float, noise_b: float, num_rows: int = 120):
    """Two runs over the same references, each word replaced with the run's chance."""
    source = random.Random(0)
    scored = ([], [])
    for _ in range(num_rows):
        reference = source.choices(WORDS, k=12)
        for rows, noise in zip(scored, (noise_a, noise_b), strict=True):
            text = [source.choice(WORDS) if source.random() < noise else word for word in reference]
            rows.append(score_row("".join(text), "".join(reference)))
    return scored


def by_name(differences):
    assert [difference.metric for difference in differences] == list(METRICS)
    return {difference.metric: difference for difference in differences}


def test_clear_change_is_significant_in_the_right_direction():
    worse, better = runs(0.7, 0.3)
    for name, difference in by_name(paired_bootstrap(worse, better)).items():
        if name == "exact-match":
            continue
        assert difference.is_significant
        assert 0 < difference.low < difference.change < difference.high
    back = by_name(paired_bootstrap(better, worse))["bleu-4"]
    assert back.is_significant
    assert back.high < 0
    assert "`new` is worse than `old` in bleu-4: -" in back.verdict("old", "new")
    assert "p = 0.001" in back.verdict() or "p < 0.001" in back.verdict()


def test_same_quality_is_not_significant():
    difference = by_name(paired_bootstrap(*runs(0.5, 0.5)))["rouge-1"]
    assert not difference.is_significant
    assert difference.low < 0 < difference.high
    assert "do not differ significantly in rouge-1" in difference.verdict()


def test_a_run_against_itself_has_no_change_and_p_one():
    rows, _ = runs(0.5, 0.5)
    for difference in paired_bootstrap(rows, rows):
        assert (difference.change, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)


def test_pairing_sees_what_separate_intervals_hide():
    rows, _ = runs(0.5, 0.5, num_rows=200)
    easier = [score_row("这条裤子版型宽松", "这条裤子版型宽松")] * 12
    harder = [score_row("这条裤子版型很松", "这条裤子版型宽松")] * 12
    difference = by_name(paired_bootstrap([*rows, *harder], [*rows, *easier]))["bleu-4"]
    assert difference.is_significant
    assert difference.change < 5


def test_seed_fixes_the_outcome():
    pair = runs(0.5, 0.45)
    assert paired_bootstrap(*pair) == paired_bootstrap(*pair)
    assert paired_bootstrap(*pair) != paired_bootstrap(*pair, seed=1)
