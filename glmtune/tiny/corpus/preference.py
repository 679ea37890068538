"""Pairs of advertisements of which one is better: the shipped data set ``data/preference``.

The better one says what the attribute list says. The worse one is as fluent and about as long, but half of
the attributes are wrong in it (another value), or it praises in general where it should name them.

``python -m glmtune.tiny.corpus.preference data/preference`` writes ``train.jsonl`` and ``dev.jsonl``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from glmtune.tiny.corpus.ads import (
    REQUESTS,
    Attributes,
    advertisement,
    content,
    draw_attributes,
    value_names,
)
from glmtune.tiny.corpus.sample import lexicon, pick


def worse_advertisement(rng: Random, pairs: Attributes) -> str:
    """Write an advertisement that does not keep to its attributes.

    Args:
        rng: source of randomness.
        pairs: attributes, the type first; at least one more.

    Returns:
        Half of the attributes, rounded up, have another value, or are left out for general praise.
    """
    places = set(rng.sample(range(1, len(pairs)), len(pairs) // 2))
    if rng.random() < 0.5:
        changed = [
            (key, _other(rng, key, pairs) if place in places else value)
            for place, (key, value) in enumerate(pairs)
        ]
        return advertisement(rng, changed)
    kept = [pair for place, pair in enumerate(pairs) if place not in places]
    sentences = lexicon("sentences")
    praise = [*sentences[pairs[0][1]]["effect"], *sentences["any"]["effect"]]
    return "，".join([advertisement(rng, kept).rstrip("。"), *rng.sample(praise, len(places))]) + "。"


def _other(rng: Random, key: str, pairs: Attributes) -> str:
    """Draw a value that the list does not give to this attribute."""
    said = {value for name, value in pairs if name == key}
    return rng.choice([value for value in value_names()[key] if value not in said])


def rows(salt: str, count: int, *, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Make pairs, no attribute list twice.

    Args:
        salt: seed of these rows.
        count: how many.
        exclude: attribute lists that must not occur.

    Returns:
        Rows with ``prompt``, ``chosen`` and ``rejected``.
    """
    made: dict[str, dict[str, str]] = {}
    index = 0
    while len(made) < count:
        rng = Random(f"preference:{salt}:{index}")
        index += 1
        pairs = draw_attributes(rng, fewest=3, most=6)
        listed = content(pairs)
        better, worse = advertisement(rng, pairs), worse_advertisement(rng, pairs)
        if listed in made or listed in exclude or better == worse:
            continue
        made[listed] = {"prompt": pick(rng, REQUESTS).format(listed), "chosen": better, "rejected": worse}
    return list(made.values())


def write(folder: Path, *, train: int = 400, dev: int = 100) -> None:
    """Write ``train.jsonl`` and ``dev.jsonl``, disjoint in their attribute lists."""
    held_out = rows("dev", dev)
    lists = frozenset(line for row in held_out for line in row["prompt"].split("\n") if "#" in line)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows("train", train, exclude=lists)), ("dev", held_out)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
