"""Scores of one generated text against its reference, ROUGE and BLEU as the official ADGEN code has them."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from dataclasses import dataclass
from typing import Any, cast

from glmtune.metrics.words import segment

ADGEN_PROTOCOL = "adgen-official"
MAX_ORDER = 4
"""Longest n-grams of BLEU."""
MAX_WORDS = 100_000
"""Words of a text among which ROUGE-L looks for a common order, which takes their square; no model's context
holds as many in one answer."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric is, so that a figure can be traced.

    Attributes:
        protocol: the published definition it follows, or "" for one of ours.
        signature: how it is computed; ``{package}`` stands for an installed version.
    """

    protocol: str
    signature: str

    def describe(self) -> str:
        """Return the signature with the installed versions filled in."""
        versions = {
            name.replace("-", "_"): importlib.metadata.version(name)
            for name in ("jieba", "rouge-chinese", "nltk")
        }
        return self.signature.format(**versions)


def _rouge(kind: str) -> Metric:
    words = "tok:jieba-{jieba}|rouge_chinese-{rouge_chinese}"
    return Metric(ADGEN_PROTOCOL, f"{kind}|stat:f|level:row-mean|{words}")


def _bleu(smoothing: str, level: str, tokenizer: str, protocol: str = "") -> Metric:
    return Metric(protocol, f"bleu|n:4|smooth:{smoothing}|level:{level}|tok:{tokenizer}|nltk-{{nltk}}")


METRICS: dict[str, Metric] = {
    "rouge-1": _rouge("rouge-1"),
    "rouge-2": _rouge("rouge-2"),
    "rouge-l": _rouge("rouge-l"),
    "bleu-4": _bleu("method3", "row-mean", "char", ADGEN_PROTOCOL),
    "word-bleu-4": _bleu("method3", "row-mean", "jieba-{jieba}"),
    "corpus-bleu-4": _bleu("none", "corpus", "char"),
    "exact-match": Metric("", "exact-match|strip:edges"),
}
"""Every metric, in the order of tables; all run from 0 to 100."""

ROW_METRICS = tuple(name for name in METRICS if name != "corpus-bleu-4")
"""The metrics that every row has a score of."""


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of one row, and what the corpus BLEU needs of it.

    Attributes:
        values: one figure from 0 to 100 per name in ``ROW_METRICS``, rounded to 4 places as officially.
        bleu_counts: 10 integers: matching character n-grams (n = 1..4), character n-grams of the prediction
            (n = 1..4, at least 1 each, as NLTK counts), characters of the prediction, of the reference.
        is_prediction_empty: nothing but blanks was generated; all its scores are 0.
        is_reference_empty: nothing but blanks to compare with; all its scores are 0.
    """

    values: tuple[float, ...]
    bleu_counts: tuple[int, ...]
    is_prediction_empty: bool = False
    is_reference_empty: bool = False

    def named(self) -> dict[str, float]:
        """Return the scores by the names of ``ROW_METRICS``, as they go into JSON files."""
        return dict(zip(ROW_METRICS, self.values, strict=True))


@functools.cache
def _rouge_scorer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rouge_chinese import Rouge
    return Rouge(metrics=["rouge-1", "rouge-2"])  # its ROUGE-L takes 1 GB for two texts of 3,000 words


def score_row(prediction: str, reference: str) -> RowScores:
    """Score one prediction.

    ROUGE-1/2/L are F measures over jieba words; BLEU-4 is NLTK's sentence BLEU over characters (over words:
    ``word-bleu-4``) with smoothing method 3. A text of blanks only has no words for ROUGE, which the official
    code dies of; here the row scores 0 and is marked.

    Args:
        prediction: the generated text, already without special tokens.
        reference: the text to compare with, already cut to the length the protocol wants.

    Returns:
        The scores, 0 to 100.

    Source:
        ``compute_metrics`` in ``ptuning/main.py`` of THUDM/ChatGLM2-6B at 3be48aa.

    >>> score_row("这件衬衫很好看。", "这件衬衫真好看。").named()["rouge-1"]
    80.0
    """
    # Characters for BLEU and words for ROUGE, each row rounded to 4 places: so the official script has it,
    # and published ADGEN scores are only comparable computed in the same way.
    empty = (not prediction.strip(), not reference.strip())
    if any(empty):
        counts = _bleu_counts(prediction.strip(), reference.strip())
        return RowScores((0.0,) * len(ROW_METRICS), counts, *empty)
    prediction_words, reference_words = segment(prediction), segment(reference)
    spaced = " ".join(prediction_words), " ".join(reference_words)
    rouge = _rouge_scorer().get_scores(*spaced)[0]
    figures = (
        *(rouge[name]["f"] for name in ("rouge-1", "rouge-2")),
        _rouge_l(*map(_rouge_words, spaced)),
        _sentence_bleu(list(prediction), list(reference)),
        _sentence_bleu(prediction_words, reference_words),
        float(prediction.strip() == reference.strip()),
    )
    values = tuple(round(figure * 100, 4) for figure in figures)
    return RowScores(values, _bleu_counts(prediction, reference))


def _rouge_words(spaced: str) -> list[str]:
    """Return the words as rouge_chinese counts them, an empty one for each blank line included."""
    sentences = [" ".join(part.split()) for part in _rouge_scorer().cut_sent(spaced) if part]
    return [word for sentence in sentences for word in sentence.split(" ")]


def _rouge_l(prediction: list[str], reference: list[str]) -> float:
    """Return the F measure of rouge_chinese's ROUGE-L; both texts have a word at least."""
    length = _common_length(prediction[:MAX_WORDS], reference[:MAX_WORDS])
    recall, precision = length / len(reference), length / len(prediction)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _common_length(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence, a row of its table in the bits of one integer.

    Source:
        Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    if len(a) < len(b):
        a, b = b, a
    places: dict[str, int] = {}
    for place, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << place
    mask = (1 << len(b)) - 1
    row = mask
    for word in a:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & mask
    return len(b) - row.bit_count()


def _sentence_bleu(prediction: list[str], reference: list[str]) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    bleu = sentence_bleu([reference], prediction, smoothing_function=SmoothingFunction().method3)
    return cast("float", bleu)


def _bleu_counts(prediction: str, reference: str) -> tuple[int, ...]:
    from nltk.translate.bleu_score import modified_precision

    orders = range(1, MAX_ORDER + 1)
    precisions = [modified_precision([list(reference)], list(prediction), order) for order in orders]
    return (
        *(precision.numerator for precision in precisions),
        *(precision.denominator for precision in precisions),
        len(prediction),
        len(reference),
    )
