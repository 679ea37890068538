"""Segmentations of equal score: which one sentencepiece took when ChatGLM-6B was trained and released.

A unigram model takes the segmentation of the highest score. Pieces that repeat one text (``:`` and
``::``, ``哈哈`` and ``哈哈哈哈``) give the same sum in any order, so rounding decides, and versions of
sentencepiece round differently. Up to 0.1.99 a candidate is compared in double precision with the best score
so far, which is kept in single precision.

Newer versions, which we run on, find the same score but may order such pieces differently, and the model was
trained on the old order. So their result is taken, and only runs of repetitions in it are segmented anew with
the old arithmetic; everything else has one best segmentation, which all versions find.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from sentencepiece import SentencePieceProcessor

_LONGEST_PIECE = 64
"""Characters up to which a piece is looked for; the longest of the released file has 16."""
_USER_DEFINED_SCORE = -0.1
"""Of a user-defined piece: ``length * max_score_ - 0.1``, and ``max_score_`` is 0 here."""
_UNKNOWN_PENALTY = 10.0
"""Below the lowest score: what a character without a piece is scored (``kUnkPenalty``)."""


class TieBreaker:
    """Puts pieces that are repetitions of one text into the order of sentencepiece 0.1.99.

    Source:
        google/sentencepiece, v0.1.99, src/unigram_model.cc, ``EncodeOptimized``.
    """

    def __init__(self, model: SentencePieceProcessor) -> None:
        """Take the model whose segmentations are to be settled."""
        self._model = model

    def settle(self, ids: list[int]) -> list[int]:
        """Return a segmentation of the same text, equal but for the order inside runs of repetitions.

        Args:
            ids: piece ids as sentencepiece returns them.
        """
        pieces: list[str] = self._model.IdToPiece(ids)
        settled: list[int] = []
        start = 0
        while start < len(pieces):
            # A run: neighbours that repeat one text, so that any order of them spells the same characters.
            stop = start + 1
            while stop < len(pieces) and _commute(pieces[stop - 1], pieces[stop]):
                stop += 1
            run = ids[start:stop]
            if len(set(run)) > 1:
                run = self._best_path("".join(pieces[start:stop]), self._score(settled))
            settled += run
            start = stop
        return settled

    @cached_property
    def _unknown_score(self) -> float:  # the lowest of 130,000 scores: looked for only if it is needed
        scores = (self._model.GetScore(index) for index in range(self._model.get_piece_size()))
        return min(scores) - _UNKNOWN_PENALTY

    # The score of what stands before a run decides how its sums are rounded, so it is added up as then: each
    # step in double precision, the sum kept in single.
    def _score(self, ids: Sequence[int]) -> np.float32:
        total = np.float32(0)
        for score in self._scores(ids):
            total = np.float32(score + float(total))
        return total

    def _scores(self, ids: Iterable[int]) -> Iterable[float]:
        # Byte fallback: the bytes of a character without a piece were scored together, as one unknown.
        for index in ids:
            if not self._model.IsByte(index):
                yield self._model.GetScore(index) or _USER_DEFINED_SCORE
            elif int(self._model.IdToPiece(index)[3:5], 16) & 0xC0 != 0x80:  # the first byte of a character
                yield self._unknown_score

    def _best_path(self, text: str, before: np.float32) -> list[int]:
        """Segment a text behind pieces of the total score ``before``."""
        # Viterbi: place in the text → best score up to there, where its last piece starts, and that piece.
        best: dict[int, tuple[np.float32, int, int]] = {0: (before, 0, 0)}
        for start in range(len(text)):
            if start not in best:
                continue
            for stop in range(start + 1, min(start + _LONGEST_PIECE, len(text)) + 1):
                index = self._model.PieceToId(text[start:stop])
                if self._model.IsUnknown(index):
                    continue
                score = self._model.GetScore(index) + float(best[start][0])
                if stop not in best or score > float(best[stop][0]):
                    best[stop] = (np.float32(score), start, index)
        path, stop = [], len(text)
        while stop:
            _, stop, index = best[stop]
            path.append(index)
        return path[::-1]


def _commute(one: str, other: str) -> bool:
    """Whether two texts are repetitions of the same text."""
    return one[0] == other[0] and one + other == other + one
