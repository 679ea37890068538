"""The corpus of glm-tiny: a weighted mix of exercises, the same for the same seed; run it to write JSONL.

``python -m glmtune.tiny.corpus.mix 1000 corpus.jsonl`` writes 1,000 rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from glmtune.tiny.corpus.ads import ads, ads_long, bare_list
from glmtune.tiny.corpus.arithmetic import arithmetic, arithmetic_text
from glmtune.tiny.corpus.characters import copying, strings
from glmtune.tiny.corpus.chat import conversation
from glmtune.tiny.corpus.facts import choice, facts, few_shot, few_shot_open
from glmtune.tiny.corpus.reasoning import reasoning, reasoning_text
from glmtune.tiny.corpus.sample import Sample

MIX: dict[str, tuple[Callable[[Random], Sample], float]] = {
    "copying": (copying, 5),
    "strings": (strings, 6),
    "ads": (ads, 12),
    "ads_bare": (bare_list, 3),
    "ads_long": (ads_long, 5),
    "arithmetic": (arithmetic, 20),
    "arithmetic_text": (arithmetic_text, 2),
    "facts": (facts, 10),
    "facts_text": (few_shot_open, 1),
    "choice": (choice, 23),
    "choice_text": (few_shot, 4),
    "reasoning": (reasoning, 7),
    "reasoning_text": (reasoning_text, 1),
    "chat": (conversation, 8),
}


def draw(seed: int, index: int, *, salt: str = "train") -> Sample:
    """Make row ``index`` of the corpus; any row can be made without the ones before it.

    Args:
        seed: the corpus' seed.
        index: number of the row.
        salt: separates the training rows from the rows of the exam.

    Returns:
        The sample.
    """
    rng = Random(f"{salt}:{seed}:{index}")
    names = list(MIX)
    skill = rng.choices(names, weights=[weight for _, weight in MIX.values()])[0]
    return MIX[skill][0](rng)


def stream(seed: int, count: int, *, salt: str = "train") -> Iterator[Sample]:
    """Yield the first ``count`` rows of the corpus."""
    return (draw(seed, index, salt=salt) for index in range(count))


def write(path: Path, *, seed: int, count: int, salt: str = "train") -> None:
    """Write the first ``count`` rows of the corpus to a JSONL file.

    Args:
        path: file to write; its folder is made.
        seed: the corpus' seed.
        count: number of rows.
        salt: see ``draw``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for sample in stream(seed, count, salt=salt):
            file.write(json.dumps(sample.as_row(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[2]), seed=0, count=int(sys.argv[1]))
