"""Grades by overlap: worked out by hand, and as NLTK and LongBench's definitions give them."""

from __future__ import annotations

import pytest

from evaluation.extraction import overlap


@pytest.mark.parametrize(
    ("text", "reference", "grade"),
    [
        ("The lake.", "a lake", 1.0),
        ("in the village of Senn", "Senn", 2 * (1 / 4) / (1 / 4 + 1)),
        ("red red house", "red house", 2 * (2 / 3) / (2 / 3 + 1)),
        ("nothing", "lake", 0.0),
        ("the", "lake", 0.0),
        ("", "lake", 0.0),
    ],
    ids=["articles", "one of four", "twice", "none", "only an article", "empty"],
)
def test_f1_of_english_words(text: str, reference: str, grade: float) -> None:
    assert overlap.f1_en(text, reference) == pytest.approx(grade)
    assert overlap.f1(text, reference) == pytest.approx(grade)


def test_f1_of_chinese_words() -> None:
    assert overlap.f1_zh("由周立设计。", "周立设计") == pytest.approx(overlap.f1("由周立设计！", "周立设计"))
    assert 0 < overlap.f1_zh("由周立设计。", "周立设计") < 1
    assert overlap.f1_zh("一九二三年。", "一九二三年") == 1.0
    assert overlap.f1_zh("，。", "周立") == 0.0


def test_rouge_l_by_hand() -> None:
    """Words 我 喜欢 苹果 and 我 喜欢 香蕉: two of three in common order, precision and recall 2/3."""
    assert overlap.rouge_l("我 喜欢 苹果", "我 喜欢 香蕉") == pytest.approx(2 / 3, abs=1e-4)
    assert overlap.rouge_l("", "我") == 0.0


def test_bleu_is_nltks() -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    text, reference = "河边有一座石桥", "河上有一座老石桥"
    expected = sentence_bleu([list(reference)], list(text), smoothing_function=SmoothingFunction().method3)
    assert overlap.bleu(text, reference) == pytest.approx(expected, abs=1e-4)
    assert overlap.bleu(text, text) == 1.0
