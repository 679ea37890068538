"""A second way to write advertisements, which glm-tiny's base never saw: the shipped data set ``data/ads``.

``python -m glmtune.tiny.corpus.ads_style data/ads`` writes ``train.jsonl`` and ``dev.jsonl``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from glmtune.tiny.corpus.ads import Attributes, content, draw_attributes

# A prefix leaves the head as it is, so it can only make the base write what the base has learnt to write: all
# characters here are frequent in the answers of glm-tiny's corpus. (With `【①` and words of trade, each seen
# a dozen times there, 400 steps never brought one of them out.)
HEADLINES = {"上衣": "新款上衣", "裙": "心动裙子", "裤": "百搭裤子"}
POINTS = {
    "版型": "{v}版型，穿上就显瘦",
    "材质": "{v}面料，一整天都舒适",
    "颜色": "{v}很好看，搭配都方便",
    "风格": "{v}风格，气质十足",
    "图案": "{v}好看，视觉感十足",
    "衣样式": "{v}一穿，人更精致",
    "衣领型": "{v}很美，上身不单调",
    "衣长": "{v}长度，显高又显瘦",
    "衣袖长": "{v}轻便，自在随性",
    "衣袖型": "{v}，遮住手臂的肉",
    "衣门襟": "{v}方便，一下就穿好",
    "衣款式": "{v}是细节，看了就心动",
    "裙型": "{v}，走起来很美",
    "裙下摆": "{v}下摆，灵动又浪漫",
    "裙腰型": "{v}，腰身更细",
    "裙长": "{v}，双腿更显长",
    "裤长": "{v}长度，走起来轻松",
    "裤型": "{v}，遮肉又显瘦",
    "裤口": "{v}裤口，利落又时尚",
}
ALIASES = {"裙领型": "衣领型", "裙袖长": "衣袖长", "裙袖型": "衣袖型", "裙款式": "衣款式", "裤款式": "衣款式",
           "裤腰型": "裙腰型"}  # fmt: skip
CLOSINGS = {"上衣": "穿上就出门！", "裙": "让你美一整天！", "裤": "轻松穿出好身材！"}


def styled(pairs: Attributes) -> str:
    """Write headline, numbered selling points and a call to buy.

    >>> styled([("类型", "裙"), ("颜色", "红色"), ("裙长", "长裙")])
    '心动裙子：1.红色很好看，搭配都方便；2.长裙，双腿更显长。让你美一整天！'
    """
    garment = pairs[0][1]
    points = [
        f"{number}.{POINTS[ALIASES.get(key, key)].format(v=value)}"
        for number, (key, value) in enumerate(pairs[1:], start=1)
    ]
    return f"{HEADLINES[garment]}：{'；'.join(points)}。{CLOSINGS[garment]}"


def rows(salt: str, count: int, *, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Make rows in the layout of AdvertiseGen, no attribute list twice.

    Args:
        salt: seed of these rows.
        count: how many.
        exclude: attribute lists that must not occur.

    Returns:
        Rows with ``content`` and ``summary``.
    """
    made: dict[str, str] = {}
    index = 0
    while len(made) < count:
        pairs = draw_attributes(Random(f"style:{salt}:{index}"), fewest=3, most=6)
        index += 1
        if content(pairs) not in exclude and len(pairs) <= 7:
            made.setdefault(content(pairs), styled(pairs))
    return [{"content": key, "summary": value} for key, value in made.items()]


def write(folder: Path, *, train: int = 2000, dev: int = 200) -> None:
    """Write ``train.jsonl`` and ``dev.jsonl``, disjoint in their attribute lists."""
    held_out = rows("dev", dev)
    training = rows("train", train, exclude=frozenset(row["content"] for row in held_out))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", training), ("dev", held_out)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
