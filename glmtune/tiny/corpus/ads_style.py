"""A second way to write advertisements, which glm-tiny's base never saw: the shipped data set ``data/ads``.

``python -m glmtune.tiny.corpus.ads_style data/ads`` writes ``train.jsonl`` and ``dev.jsonl``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from glmtune.tiny.corpus.ads import Attributes, content, draw_attributes

HEADLINES = {"上衣": "今日上新", "裙": "心动裙装", "裤": "好裤推荐"}
POINTS = {
    "版型": "版型{v}，高矮胖瘦都好穿",
    "材质": "{v}做的，摸着就放心",
    "颜色": "{v}耐脏又提气色",
    "风格": "{v}范儿，同事见了都问链接",
    "图案": "{v}花样，近看远看都有戏",
    "衣样式": "{v}一穿，出门不用想",
    "衣领型": "{v}显脸小，拍照随便拍",
    "衣长": "{v}刚刚好，小个子别担心",
    "衣袖长": "{v}干活方便，洗手不湿",
    "衣袖型": "{v}藏住拜拜肉",
    "衣门襟": "{v}一秒穿好，赖床也来得及",
    "衣款式": "{v}是小心机，懂的都懂",
    "裙型": "{v}走路会跳舞",
    "裙下摆": "{v}下摆，转圈特别美",
    "裙腰型": "{v}吃饱了也不勒",
    "裙长": "{v}配什么鞋都行",
    "裤长": "{v}不拖地，雨天也敢穿",
    "裤型": "{v}蹲下起来不变形",
    "裤口": "{v}裤脚，走路带风",
}
ALIASES = {"裙领型": "衣领型", "裙袖长": "衣袖长", "裙袖型": "衣袖型", "裙款式": "衣款式", "裤款式": "衣款式",
           "裤腰型": "裙腰型"}  # fmt: skip
CLOSINGS = {"上衣": "数量不多，喜欢就带走吧！", "裙": "姐妹们，下手要快！", "裤": "库存告急，先到先得！"}
NUMERALS = "①②③④⑤⑥⑦⑧⑨"


def styled(pairs: Attributes) -> str:
    """Write headline, numbered selling points and a call to buy.

    >>> styled([("类型", "裙"), ("颜色", "红色"), ("裙长", "长裙")])
    '【心动裙装】①红色耐脏又提气色；②长裙配什么鞋都行。姐妹们，下手要快！'
    """
    garment = pairs[0][1]
    points = []
    for numeral, (key, value) in zip(NUMERALS, pairs[1:], strict=False):
        points.append(numeral + POINTS[ALIASES.get(key, key)].format(v=value))
    return f"【{HEADLINES[garment]}】{'；'.join(points)}。{CLOSINGS[garment]}"


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
