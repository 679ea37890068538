"""Grades of a text by what it shares with a reference, from 0 to 1: ROUGE-L, BLEU, F1 over words.

ROUGE-L and BLEU are those of `glmtune.metrics.text` (`glmtune score`), F1 is that of question answering
(SQuAD, LongBench): words count, their order does not.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from glmtune.metrics.text import score_row
from glmtune.metrics.words import segment

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
# ASCII's, and those of CJK texts: of full and half width, brackets, quotation marks, dashes and dots.
_MARKS = frozenset(
    string.punctuation + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
    "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def rouge_l(text: str, reference: str) -> float:
    """Return the F measure of ROUGE-L over jieba words, from 0 to 1.

    >>> rouge_l("这件衬衫很好看。", "这件衬衫真好看。")
    0.8
    """
    return score_row(text, reference).named()["rouge-l"] / 100


def bleu(text: str, reference: str) -> float:
    """Return sentence BLEU-4 over characters with smoothing method 3, from 0 to 1.

    >>> bleu("这件衬衫很好看。", "这件衬衫很好看。")
    1.0
    """
    return min(1.0, score_row(text, reference).named()["bleu-4"] / 100)


def f1(text: str, reference: str) -> float:
    """Return the F1 of shared words: `f1_zh` where the reference has Chinese characters, else `f1_en`.

    >>> round(f1("the Red house", "a red barn"), 3), f1("在北京。", "北京")
    (0.5, 0.6666666666666666)
    """
    return f1_zh(text, reference) if _CHINESE.search(reference) else f1_en(text, reference)


def f1_en(text: str, reference: str) -> float:
    """Return the F1 of shared English words; case, marks and articles do not matter.

    Source:
        Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1; ``qa_f1_score`` of THUDM/LongBench.
    """
    return _f1(_english_words(text), _english_words(reference))


def f1_zh(text: str, reference: str) -> float:
    """Return the F1 of shared words as jieba cuts them; case and marks do not matter.

    Source:
        ``qa_f1_zh_score`` of THUDM/LongBench, arXiv:2308.14508.
    """
    return _f1(_chinese_words(text), _chinese_words(reference))


def _english_words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(c for c in word.lower() if c not in _MARKS) for word in segment(text))
    return [bare for word in words if (bare := "".join(word.split()))]


def _f1(words: list[str], reference: list[str]) -> float:
    shared = sum((Counter(words) & Counter(reference)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(reference)
    return 2 * precision * recall / (precision + recall)
