"""Whether an answer is in the style of the task: what a leak of the task into general answers is told by.

Two sets of texts are compared by their trigrams of characters: answers of the training rows, and the base's
own answers to general prompts. For every trigram g of an answer,

    log odds of g = log (n_task(g) / N_task + e) - log (n_base(g) / N_base + e),    e = 1 / (N_task + N_base)

with n how often it occurs and N all occurrences: naive Bayes with equal priors, and a smoothing that gives a
trigram which neither has seen no weight, however different the sets are in size. (Adding one to every count,
as usual, would count each unseen trigram for the smaller set.) An answer's score is the mean over its
trigrams, so long and short answers are alike.

The threshold comes from the base itself: its own answers are scored, each against the counts of all the
others, and the highest 1 % of these scores, or 0 if that is more, is still no leak. A base that talks like
the task from the start thus raises it, up to the point where nothing can be told apart.

Characters, not words: Chinese and English need the same, nothing has to be segmented, and a set of two
thousand answers is counted in well under a second.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

SIZE = 3
"""Characters of a piece: two tell languages apart rather than styles, four are too rare in short answers."""
OWN_FRAC = 0.99
"""Share of the base's own answers that the threshold leaves below it."""
BEGIN, END = "\x02", "\x03"
"""Around every text, so that how answers begin and end counts, and the shortest has a trigram."""


class TaskStyle:
    """Tells answers in the style of a task from those of a base.

    Attributes:
        threshold: log odds per trigram (nats) from above which on an answer is in the style of the task.
    """

    def __init__(self, task: Iterable[str], base: Sequence[str]) -> None:
        """Count both sets and place the threshold.

        Args:
            task: answers of the task, such as those of the training rows.
            base: the base's answers to general prompts.
        """
        self._task = _counted(task)
        self._base = _counted(base)
        self._num_task, self._num_base = self._task.total(), self._base.total()
        own = sorted(self._score(_pieces(text), without=True) for text in base)
        # The lowest score that at least OWN_FRAC of them do not exceed.
        place = max(math.ceil(OWN_FRAC * len(own)) - 1, 0)
        self.threshold = max(own[place] if own else 0.0, 0.0)

    def score(self, text: str) -> float:
        """Return the log odds of an answer for the task against the base, in nats per trigram.

        >>> style = TaskStyle(["a red coat, soft and warm"], ["two and two is four"])
        >>> style.score("a red coat") > 0 > style.score("two is four")
        True
        """
        return self._score(_pieces(text))

    def is_of_task(self, text: str) -> bool:
        """Tell whether an answer is in the style of the task."""
        return self.score(text) > self.threshold

    def _score(self, pieces: Counter[str], *, without: bool = False) -> float:
        """Score a text; ``without`` takes its own trigrams out of the base's counts first."""
        own = pieces.total() if without else 0
        num_base = max(self._num_base - own, 1)
        smoothing = 1 / max(self._num_task + self._num_base - own, 1)
        score = 0.0
        for piece, count in pieces.items():
            in_base = self._base[piece] - (count if without else 0)
            odds = (self._task[piece] / max(self._num_task, 1) + smoothing) / (in_base / num_base + smoothing)
            score += count * math.log(odds)
        return score / pieces.total()


def _counted(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_pieces(text))
    return counts


def _pieces(text: str) -> Counter[str]:
    marked = f"{BEGIN}{text}{END}"
    return Counter(marked[start : start + SIZE] for start in range(max(len(marked) - SIZE + 1, 1)))
