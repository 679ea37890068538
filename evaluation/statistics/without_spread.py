"""What may be said where all values are equal, so that nothing shows how much others would differ.

A standard error of 0 would make two equal differences a certainty. All that is known of others is their
range, and that few of them can be elsewhere: with confidence c fewer than a share q of all,
``(1 - q)^n = 1 - c``, else one of n would probably have been seen (the rule of three, in its exact form)::

    n equal values m, range [-1, 1]     mean of all between (1 - q) m - q and (1 - q) m + q
"""

from __future__ import annotations


def bounds(mean: float, count: int, *, confidence: float, lowest: float = -1.0) -> tuple[float, float]:
    """Return the interval around equal values.

    >>> [round(end, 3) for end in bounds(0.0, 100, confidence=0.95)]
    [-0.036, 0.036]

    Args:
        mean: the value of all.
        count: how many, at least one.
        confidence: of the two-sided interval; each end has half of the rest.
        lowest: that a value can be; the highest is 1.
    """
    share = 1 - ((1 - confidence) / 2) ** (1 / count)
    return (1 - share) * mean + share * lowest, (1 - share) * mean + share


def p_value(mean: float, count: int) -> float:
    """Return the two-sided p of a mean of 0: that of the interval of differences whose end is 0.

    For differences of 1 it is that of the sign test, ``2^(1 - n)``.

    >>> p_value(1.0, 6), p_value(0.0, 6)
    (0.03125, 1.0)

    Args:
        mean: the value of all.
        count: how many.
    """
    return min(1.0, 2 * (1 + abs(mean)) ** -count)
