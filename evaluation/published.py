"""Published figures, to stand beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


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


@cache
def published_tables() -> tuple[Mapping[str, Any], ...]:
    """Return the tables of ``published.yaml`` beside this file as plain values."""
    import yaml

    return tuple(yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")))


def published_row(benchmark: str, split: str, model: str) -> PublishedRow | None:
    """Return the figures of a model, None where none were published for that split.

    Args:
        benchmark: such as ``ceval``.
        split: such as ``val``; figures of another split are never taken instead.
        model: preset, hub id or folder; its last part counts, whatever the owner and case.

    >>> published_row("ceval", "val", "THUDM/chatglm2-6b").average
    53.57
    >>> published_row("ceval", "val", "glm-tiny") is None
    True
    """
    name = model.rstrip("/").replace("\\", "/").rpartition("/")[2].lower()
    for table in published_tables():
        if (table["benchmark"], table["split"]) == (benchmark, split) and name in table["rows"]:
            average, *categories = table["rows"][name]
            return PublishedRow(
                average=average,
                categories=dict(zip(table["categories"], categories, strict=True)),
                source=f"{table['source']} ({table['note']})",
            )
    return None
