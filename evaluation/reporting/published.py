"""Published figures, to stand beside measured ones: ``published.yaml`` holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

NO_ADAPTER = "none"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """What was published of one model on one split of a benchmark.

    Attributes:
        average_name: how the publisher averages: ``accuracy_micro``, ``accuracy_macro``, ...
        average: that average, in percent.
        categories: by name, in percent.
        source: where it was published.
        note: what a reader must know before comparing.
    """

    average_name: str
    average: float
    categories: Mapping[str, float]
    source: str
    note: str


@cache
def published_tables() -> tuple[Mapping[str, Any], ...]:
    """Return the tables of ``published.yaml``, read once."""
    from glmtune.storage.yaml_text import read_yaml

    return tuple(read_yaml(Path(__file__).with_suffix(".yaml")))


def published_row(benchmark: str, split: str, model: Mapping[str, Any]) -> PublishedRow | None:
    """Return what was published of a model; nothing was of a tuned one.

    Args:
        benchmark: such as ``ceval``.
        split: such as ``val``.
        model: identity of the model, as a fingerprint holds it; the last part of its name counts.

    Returns:
        The first row found, None without any.
    """
    if model["adapter"] != NO_ADAPTER:
        return None
    # The same model has many names (`THUDM/chatglm2-6b`, `/models/chatglm2-6b/`): the last part decides.
    name = re.split(r"[/\\:]", str(model["name"]).rstrip("/\\"))[-1].lower()
    quantization = str(model["quantization"])
    if quantization not in ("none", "unknown") and not name.endswith(quantization):
        name = f"{name}-{quantization}"
    for table in published_tables():
        if (table["benchmark"], table["split"]) == (benchmark, split) and name in table["rows"]:
            average, *categories = table["rows"][name]
            named = dict(zip(table["categories"], categories, strict=True))
            return PublishedRow(table["average"], average, named, table["source"], table["note"])
    return None
