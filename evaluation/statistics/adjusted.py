"""Several tests at once: p-values that keep the chance of any false alarm at the level."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several tests so that the chance of any false alarm stays at the level.

    52 subjects, each tested at 5 %, raise two or three false alarms in every comparison. Holm's adjustment
    holds however the tests depend on each other, as those of one model do, and is never weaker than
    Bonferroni's.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        # The smallest p-value is multiplied by the number of tests, the next by one less; never below the
        # last.
        running = max(running, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = running
    return adjusted
