"""Several data sets as one split: which rows are whose, and how many of each make an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from glmtune.data.conversations import SplitFacts
from glmtune.data.reading.sources import described_files
from glmtune.data.truncation import TruncationCounts
from glmtune.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MixPart:
    """Rows of one set of a mixture; those of all sets lie one behind the other, in the order of the sets.

    Attributes:
        name: of the set.
        weight: its share of an epoch, relative to the others'; None: every row counts once.
        num_rows: rows that it has.
    """

    name: str
    weight: float | None
    num_rows: int


def rows_per_epoch(parts: Sequence[MixPart]) -> list[int]:
    """Return how many rows each set gives to an epoch, which has as many as all sets together.

    Shares are rounded so that they add up: down, and what is left goes to the largest remainders.

    Args:
        parts: of the mixture.

    Raises:
        ConfigError: a set's weight is so small that no row comes of it.

    >>> rows_per_epoch([MixPart("a", 3, 10), MixPart("b", 1, 90)])
    [75, 25]
    """
    total = sum(part.num_rows for part in parts)
    if any(part.weight is None for part in parts):
        return [part.num_rows for part in parts]
    weights = np.array([part.weight for part in parts], dtype=np.float64)
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    for part, count in zip(parts, counts, strict=True):
        if not count:
            raise ConfigError(
                f"`weight` of `{part.name}` in `data.mix` is {part.weight}, of {weights.sum():g} in all: of"
                f" the {total} rows of an epoch none would be its. Raise it, or leave the set out."
            )
    return [int(count) for count in counts]


def joined_facts(names: Sequence[str], facts: Sequence[SplitFacts]) -> SplitFacts:
    """Return what is said of the conversations of all sets together.

    Args:
        names: of the sets.
        facts: of each.
    """
    digest = hashlib.sha256()
    for name, each in zip(names, facts, strict=True):
        digest.update(f"{name}={each.fingerprint}\n".encode())
    systems = {each.system for each in facts}
    return replace(
        facts[0],
        path=described_files(each.path for each in facts),
        kind=" and ".join(dict.fromkeys(each.kind for each in facts)),
        encoding=" and ".join(dict.fromkeys(each.encoding for each in facts if each.encoding)),
        unused_columns=tuple(dict.fromkeys(column for each in facts for column in each.unused_columns)),
        bad=[replace(row, path=row.path or each.path) for each in facts for row in each.bad],
        total=sum(each.total for each in facts),
        num_conversations=sum(each.num_conversations for each in facts),
        fingerprint=digest.hexdigest(),
        system=systems.pop() if len(systems) == 1 else None,
        is_chat=any(each.is_chat for each in facts),
    )


def joined_truncation(counts: Sequence[TruncationCounts]) -> TruncationCounts:
    """Add up what was cut."""
    names = TruncationCounts.__dataclass_fields__
    return TruncationCounts(**{name: sum(getattr(each, name) for each in counts) for name in names})
