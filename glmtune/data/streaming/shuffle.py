"""Draw items at random from a stream: among so many at a time, every one exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def shuffled(items: Iterable[Item], size: int, seed: tuple[int, ...]) -> Iterator[Item]:
    """Draw items among the ``size`` first ones, whose place the next one of the stream takes each time.

    Which place is drawn follows from the seed and the number of items alone, not from what they are, so going
    through a stream again draws the same.

    Args:
        items: of any number.
        size: of the buffer; 1 keeps the order.
        seed: decides the draws.

    >>> sorted(shuffled(range(6), 3, (0,))), list(shuffled(range(4), 1, (0,)))
    ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3])
    """
    draw = np.random.default_rng(seed)
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(draw.integers(size))
        yield buffer[place]
        buffer[place] = item
    for place in draw.permutation(len(buffer)):
        yield buffer[place]
