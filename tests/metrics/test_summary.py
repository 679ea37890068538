"""Means, corpus BLEU and bootstrap intervals of a file."""

from __future__ import annotations

import numpy as np
import pytest

from glmtune.metrics.summary import NUM_RESAMPLES, ScoreTable, corpus_bleu, resamples, summarize
from glmtune.metrics.text import METRICS, score_row

PAIRS = [
    ("这条裤子版型宽松，穿着很舒适。", "这条裤子的版型很宽松，穿着舒适又显瘦。"),
    ("简约的白色衬衫，简约的剪裁。", "白色衬衫剪裁简约，领口的刺绣增添了一丝甜美。"),
    ("", "经典的牛仔外套，百搭实用。"),
    ("好看", "好看"),
    ("适合夏天穿着的裙子", "适合夏天穿着的连衣裙子"),
]
ROWS = [score_row(*pair) for pair in PAIRS]


def test_row_mean_metrics_are_plain_means_with_empty_rows_as_zero():
    report = summarize(ROWS)
    named = [row.named() for row in ROWS]
    assert report["bleu-4"].value == pytest.approx(np.mean([row["bleu-4"] for row in named]))
    assert report["exact-match"].value == pytest.approx(20.0)
    assert (report.num_rows, report.num_empty_predictions, report.num_empty_references) == (5, 1, 0)


def test_corpus_bleu_equals_nltk():
    from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu

    expected = 100 * nltk_corpus_bleu([[list(r)] for _, r in PAIRS], [list(p) for p, _ in PAIRS])
    assert summarize(ROWS)["corpus-bleu-4"].value == pytest.approx(expected, abs=1e-9)


def test_corpus_bleu_without_any_match_is_zero():
    counts = ScoreTable.of([score_row("绿树", "耳环"), score_row("", "耳环")]).bleu_counts
    assert corpus_bleu(counts.sum(axis=0)) == 0.0
    assert corpus_bleu(np.zeros(10)) == 0.0


def test_intervals_surround_the_value_and_are_seeded():
    first, again, other = summarize(ROWS), summarize(ROWS), summarize(ROWS, seed=1)
    assert first == again
    assert first != other
    assert all(e.low <= e.value <= e.high for e in first.estimates)
    assert first["rouge-1"].low < first["rouge-1"].high


def test_interval_width_agrees_with_the_normal_approximation():
    texts = ["穿着舒适", "穿着很好看", "版型宽松", "裤子显瘦百搭"]
    rows = [score_row(texts[i % 4], texts[(i * 7 + i // 4) % 4]) for i in range(400)]
    values = ScoreTable.of(rows).values[:, 0]
    error = values.std(ddof=1) / np.sqrt(len(rows))
    estimate = summarize(rows)["rouge-1"]
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_resamples_come_in_blocks_and_each_draw_has_all_rows(monkeypatch):
    monkeypatch.setattr("glmtune.metrics.summary._CELLS_AT_ONCE", 35)
    blocks = list(resamples(5, num_resamples=20, seed=3))
    assert [len(block) for block in blocks] == [7, 7, 6]
    assert (np.concatenate(blocks).sum(axis=1) == 5).all()


def test_one_row_has_an_interval_without_width():
    estimate = summarize(ROWS[:1])["bleu-4"]
    assert estimate.low == estimate.value == estimate.high


def test_json_holds_every_metric_with_signature():
    data = summarize(ROWS).to_json()
    assert list(data["metrics"]) == list(METRICS)
    assert data["metrics"]["corpus-bleu-4"]["signature"].startswith(
        "bleu|n:4|smooth:none|level:corpus|tok:char"
    )
    assert data["num_empty_predictions"] == 1
    assert str(NUM_RESAMPLES) in data["interval"]
