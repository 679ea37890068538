"""Published figures, to stand beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """What was published of one model on one benchmark.

    Attributes:
        average: the headline average, %.
        categories: by name, %.
        source: where it was published, and under which protocol.
    """

    average: float | None
    categories: Mapping[str, float]
    source: str


def published_row(benchmark: str, split: str, model: str) -> PublishedRow | None:
    """Return the figures of a model, None where none were published for that split."""
    del benchmark, split, model
    return None
