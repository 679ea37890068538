"""Row scores against figures computed with jieba, rouge_chinese and NLTK as the official code calls them."""

from __future__ import annotations

import logging
import random
import tempfile

import pytest

from glmtune.metrics import words
from glmtune.metrics.text import METRICS, ROW_METRICS, score_row
from glmtune.metrics.words import segment

GOLDEN = [
    (
        "这条裤子版型宽松，穿着很舒适。",
        "这条裤子的版型很宽松，穿着舒适又显瘦。",
        {
            "rouge-1": 86.9565,
            "rouge-2": 38.0952,
            "rouge-l": 78.2609,
            "bleu-4": 38.1908,
            "word-bleu-4": 22.1115,
        },
    ),
    (
        "简约的白色衬衫，简约的剪裁，简约的风格。",
        "白色衬衫剪裁简约，领口的刺绣增添了一丝甜美。",
        {"rouge-1": 66.6667, "rouge-2": 9.5238, "rouge-l": 46.1538, "bleu-4": 15.8687, "word-bleu-4": 8.4503},
    ),
    (
        "好看！显瘦吗？显瘦。面料柔软",
        "好看吗？显瘦！面料十分柔软，亲肤透气。",
        {"rouge-1": 80.0, "rouge-2": 21.0526, "rouge-l": 57.1429, "bleu-4": 19.4681, "word-bleu-4": 16.2503},
    ),
    (
        "牛仔",
        "经典的牛仔外套，百搭实用。",
        {"rouge-1": 22.2222, "rouge-2": 0.0, "rouge-l": 22.2222, "bleu-4": 0.243, "word-bleu-4": 0.0322},
    ),
    (
        "The dress is 100% cotton，适合夏天。",
        "这条dress是100%纯棉，适合夏天穿。",
        {
            "rouge-1": 63.1579,
            "rouge-2": 23.5294,
            "rouge-l": 63.1579,
            "bleu-4": 31.6501,
            "word-bleu-4": 13.6744,
        },
    ),
    (
        "绿色的树叶和远处的山",
        "小巧的耳环闪着光。",
        {"rouge-1": 18.1818, "rouge-2": 0.0, "rouge-l": 16.6667, "bleu-4": 4.1961, "word-bleu-4": 6.5673},
    ),
]


@pytest.mark.parametrize(("prediction", "reference", "expected"), GOLDEN)
def test_row_scores_equal_the_official_computation(prediction, reference, expected):
    scores = score_row(prediction, reference).named()
    assert {name: scores[name] for name in expected} == expected


def test_official_code_path_agrees_with_the_libraries_called_directly():
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.setLogLevel(logging.WARNING)
    for prediction, reference, _ in GOLDEN:
        texts = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
        rouge = Rouge().get_scores(*texts)[0]
        bleu = sentence_bleu(
            [list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3
        )
        scores = score_row(prediction, reference).named()
        assert [scores[name] for name in rouge] == [round(rouge[name]["f"] * 100, 4) for name in rouge]
        assert scores["bleu-4"] == round(bleu * 100, 4)


@pytest.mark.parametrize("prediction", ["", "   ", "\n\n", "\u3000\t"])
def test_empty_prediction_scores_zero_and_is_marked(prediction):
    scores = score_row(prediction, "这条裤子很好看。")
    assert scores.is_prediction_empty
    assert not scores.is_reference_empty
    assert set(scores.values) == {0.0}


def test_empty_reference_scores_zero_and_is_marked():
    scores = score_row("这条裤子很好看。", " \n")
    assert scores.is_reference_empty
    assert not scores.is_prediction_empty
    assert set(scores.values) == {0.0}


@pytest.mark.parametrize(
    "prediction", ["。", "……", "？！”", ". . .", " 。 \n 。 ", "\u200b", "好", "a\x00b", "😀"]
)
def test_punctuation_and_short_predictions_do_not_crash(prediction):
    scores = score_row(prediction, "这条裤子很好看。")
    assert not scores.is_prediction_empty
    assert all(0.0 <= value <= 100.0 for value in scores.values)


def test_random_texts_stay_in_range():
    source = random.Random(0)
    pieces = ["好", "裤子", " ", "\n", "。", "”", "？", "……", "......", "abc", "1", "\u3000", "，"]
    for _ in range(300):
        texts = ["".join(source.choices(pieces, k=source.randint(0, 12))) for _ in range(2)]
        assert all(0.0 <= value <= 100.0 for value in score_row(texts[0], texts[1]).values)


def test_identical_texts_reach_the_top():
    scores = score_row("这条裤子版型宽松，穿着舒适。", "这条裤子版型宽松，穿着舒适。").named()
    assert scores["exact-match"] == 100.0
    assert scores["bleu-4"] == 100.0
    assert scores["rouge-l"] == 100.0


def test_exact_match_ignores_only_edges():
    assert score_row(" 好看\n", "好看").named()["exact-match"] == 100.0
    assert score_row("好 看", "好看").named()["exact-match"] == 0.0


def test_segmenting_writes_no_cache_and_logs_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words._segmenter.cache_clear()
    segment("这件衬衫很好看。")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_words_added_elsewhere_do_not_change_scores():
    import jieba

    jieba.setLogLevel(logging.WARNING)
    jieba.add_word("不存在的词语")
    try:
        assert segment("不存在的词语") != ["不存在的词语"]
    finally:
        jieba.del_word("不存在的词语")


def test_signatures_name_versions_and_protocol():
    assert METRICS["bleu-4"].protocol == METRICS["rouge-l"].protocol == "adgen-official"
    assert METRICS["word-bleu-4"].protocol == ""
    assert METRICS["bleu-4"].describe().startswith("bleu|n:4|smooth:method3|level:row-mean|tok:char|nltk-3.")
    assert "jieba-0.4" in METRICS["rouge-1"].describe()
    assert [name for name in METRICS if name not in ROW_METRICS] == ["corpus-bleu-4"]
