"""Chinese words as jieba cuts them, without touching a cache file or a log."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

MAX_RUN_CHARS = 2_000
"""Longest stretch without a blank or mark that is cut as one: for words that its dictionary lacks jieba takes
the square of it. Longer ones, which no writer makes, are parted there first."""
_INSIDE = r"\u4e00-\u9fd5a-zA-Z0-9+#&._%\-"  # at everything else jieba cuts before it looks for words
_RUN = re.compile(rf"[{_INSIDE}]{{1,{MAX_RUN_CHARS}}}|[^{_INSIDE}]+")


@functools.cache
def _segmenter() -> Any:
    """Return a jieba tokenizer with the shipped dictionary only.

    jieba's own start-up reads and writes a cache in the temporary folder, which anyone may have put there
    and which fails loudly on a read-only disk; and words that other code adds to the shared tokenizer would
    change scores. Building the dictionary takes half a second and has neither trouble.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter


def segment(text: str) -> list[str]:
    """Cut a text into words, blanks and punctuation marks included, as ``jieba.cut`` does by default.

    Args:
        text: any text; characters outside Chinese pass through as jieba treats them.

    Returns:
        The words; joined they give the text back.

    >>> segment("这件衬衫很好看。")
    ['这件', '衬衫', '很', '好看', '。']
    """
    if len(text) <= MAX_RUN_CHARS:
        return list(_segmenter().cut(text))
    return [word for run in _RUN.findall(text) for word in _segmenter().cut(run)]
