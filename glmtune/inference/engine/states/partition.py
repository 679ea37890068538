"""Which rows to hold side by side: rows of unlike length must not pay for each other.

Rows in one bank are attended to over the columns of the longest. A bank more spares the shorter ones what
they do not need, but costs operations of its own in every layer::

    cost = sum over banks of  bank_cost + rows * columns of the longest            (in columns read)

Rows sorted by length make the best banks neighbours, so the least cost is found from left to right.
"""

from __future__ import annotations

from collections.abc import Sequence

BANK_NUMBERS = {"cpu": 1 << 17}
"""Numbers in keys and values of a layer that take as long to attend to as what a bank costs beside them: on
a CPU some 60 microseconds per layer, at half a nanosecond each (float32 and bfloat16 alike)."""

LAUNCH_BOUND_BANK_NUMBERS = 1 << 25
"""The same on an accelerator, which reads hundreds of times faster but starts kernels no faster. An estimate:
not measured."""


def bank_cost(numbers_per_column: int, device_type: str) -> float:
    """Return what a bank costs in a layer, in columns of one row.

    Args:
        numbers_per_column: in keys and values of one token in one layer.
        device_type: as of ``torch.device``.
    """
    return BANK_NUMBERS.get(device_type, LAUNCH_BOUND_BANK_NUMBERS) / numbers_per_column


def partition(columns: Sequence[int], cost: float) -> list[list[int]]:
    """Divide rows into banks at the least cost.

    Args:
        columns: that each row needs, above 0.
        cost: of a bank, in columns; 0 wastes no column.

    Returns:
        Places in ``columns`` by bank, the longest first.

    >>> partition([150, 900, 148, 152], cost=100)
    [[1], [3, 0, 2]]
    """
    if not columns:
        return []
    order = sorted(range(len(columns)), key=lambda place: -columns[place])
    # Rows of about one length stand or fall together: with 128 rows some 20 candidates instead of 128.
    starts = [0]
    for place, row in enumerate(order):
        if columns[row] < (columns[order[starts[-1]]] * 15 // 16 if cost else columns[order[starts[-1]]]):
            starts.append(place)
    ends = [*starts[1:], len(order)]
    # Least cost of the first classes; where their last bank starts.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in ends:
        best.append(
            min(
                (least + cost + (end - start) * columns[order[start]], first)
                for first, ((least, _), start) in enumerate(zip(best, starts, strict=False))
            )
        )
    banks: list[list[int]] = []
    last = len(ends)
    while last:
        first = best[last][1]
        banks.append(order[starts[first] : ends[last - 1]])
        last = first
    return banks[::-1]
