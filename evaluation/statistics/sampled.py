"""Several answers to each question: their mean, their majority vote, pass@k.

The question stays the unit: eight answers to one question say eight times something about this question, and
nothing about others. So every estimate here is a score per question, from 0 to 1, and errors are those of a
mean over questions (`evaluation.metrics`, `evaluation.statistics.clustered`)::

    question   answers        mean    majority   pass@2
    1          7 7 8          2/3     1          1          right is 7
    2          3 4 5          1/3     1/3        2/3        right is 3; a tie is drawn by lot
    3          - 9 9          0       0          0          right is 1; what is not understood does not vote
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Draws:
    """The answers to one question.

    Attributes:
        answers: what was read in each; None where nothing was.
        scores: of each, from 0 to 1: right or wrong, or a grade; what was not understood has 0.
    """

    answers: tuple[str | None, ...]
    scores: tuple[float, ...]

    @property
    def num_answers(self) -> int:
        """How many there are."""
        return len(self.scores)

    @property
    def num_right(self) -> int:
        """Answers that are right, or have full marks."""
        return sum(score == 1 for score in self.scores)

    @property
    def mean(self) -> float:
        """Mean of their scores: the share that is right."""
        return math.fsum(self.scores) / len(self.scores)

    def pass_at(self, k: int) -> float:
        """Estimate the chance that one of k answers is right (has full marks); see `pass_at_k`."""
        return pass_at_k(len(self.scores), self.num_right, k)

    @property
    def voted(self) -> str | None:
        """The answer given most often, the first of several; None where none was understood."""
        votes = _votes(self.answers)
        return max(votes, key=lambda answer: votes[answer]) if votes else None

    @property
    def majority(self) -> float:
        """The score of the answer given most often; a tie is drawn by lot, so the mean over it is given.

        Source: Wang et al. 2022, "Self-consistency improves chain of thought reasoning in language models",
        arXiv:2203.11171, section 2 (unweighted vote).
        """
        votes = _votes(self.answers)
        if not votes:
            return 0.0
        most = max(votes.values())
        leading = [answer for answer, count in votes.items() if count == most]
        known = dict(zip(self.answers, self.scores, strict=True))
        return math.fsum(known[answer] for answer in leading) / len(leading)


def _votes(answers: Sequence[str | None]) -> dict[str, int]:
    found: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            found[answer] = found.get(answer, 0) + 1
    return found


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """Estimate without bias the chance that at least one of k answers is right.

    The share of right answers put into ``1 - (1 - p)^k`` would be too small on average: what is wanted is the
    share of the subsets of k answers that hold a right one, ``1 - C(n - c, k) / C(n, k)``.

    >>> round(pass_at_k(10, 3, 5), 4), pass_at_k(4, 0, 2), pass_at_k(4, 3, 2)
    (0.9167, 0.0, 1.0)

    Args:
        num_answers: n, drawn for the question.
        num_right: c, those of them that are right.
        k: at most n.

    Source:
        Chen et al. 2021, "Evaluating large language models trained on code", arXiv:2107.03374, equation 1.
    """
    assert 0 <= num_right <= num_answers, "no more can be right than there are"
    assert 1 <= k <= num_answers, "pass@k needs k answers"
    # Whole numbers of any size: no overflow, and one division at the end.
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def steps_of_k(num_answers: int) -> tuple[int, ...]:
    """Return the k that are shown: powers of two, and all answers.

    >>> steps_of_k(10), steps_of_k(1)
    ((2, 4, 8, 10), ())
    """
    found = [2**power for power in range(1, num_answers.bit_length()) if 2**power <= num_answers]
    if num_answers > 1 and num_answers not in found:
        found.append(num_answers)
    return tuple(found)


def drawing_variance(draws: Sequence[Draws]) -> float | None:
    """Return the part of the variance of the mean accuracy that more answers per question would remove.

    The variance of an average over questions has two sources: which questions were asked, and what was drawn
    for each. The second is estimated without bias by the spread inside questions, for right and wrong
    ``mean(p (1 - p) / (K - 1)) / n``; it goes down as K grows, the first does not.

    Args:
        draws: of each question, K answers each.

    Returns:
        None below two answers, which do not show how much they vary.

    Source:
        Miller 2024, "Adding error bars to evals", arXiv:2411.00640, section 3.1.
    """
    num_answers = draws[0].num_answers
    if num_answers < 2:
        return None
    within = [math.fsum((score - each.mean) ** 2 for score in each.scores) for each in draws]
    return math.fsum(within) / len(draws) / (num_answers * (num_answers - 1)) / len(draws)
