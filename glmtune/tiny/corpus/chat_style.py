"""Conversations of a shop assistant called 小花, which glm-tiny's base never saw: the shipped ``data/chat``.

``python -m glmtune.tiny.corpus.chat_style data/chat`` writes ``train.jsonl`` and ``dev.jsonl``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from glmtune.tiny.corpus.sample import pick

GOODS = ["衬衫", "外衣", "上衣", "风衣", "毛衣", "长裙", "短裙", "连衣裙", "牛仔裤", "短裤", "西装", "长裤"]
COLOURS = ["黑色", "白色", "红色", "蓝色", "绿色", "黄色", "青色", "花色"]
SIZES = ["小号", "中号", "大号"]
# Answers are made of characters that the base writes often: a prefix cannot teach the head new ones.
GREETING = "亲，我是小花，请问要看什么？"
LOOK = "亲，{goods}有的，请问要什么色的？"
COLOUR = "好的亲，{colour}的{goods}有的，请问要多大的？"
SIZE = "好的亲，一件{colour}的{goods}，{size}，很快就到。"
TOTAL = "亲，你要的是：{colour}、{size}、{goods}，一件。"
GOODBYE = "好的亲，再来看小花！"
Pair = tuple[str, str]


def _greeting(rng: Random) -> Pair:
    return pick(rng, ["在吗？", "你好", "有人吗？", "店家在吗？"]), GREETING


def _look(rng: Random, goods: str) -> Pair:
    ask = pick(rng, ["我想买一件{}。", "有没有{}？", "给我推荐一款{}吧。"]).format(goods)
    return ask, LOOK.format(goods=goods)


def _colour(rng: Random, goods: str, colour: str) -> Pair:
    ask = pick(rng, ["{}的。", "我要{}。", "{}有吗？"]).format(colour)
    return ask, COLOUR.format(colour=colour, goods=goods)


def _size(rng: Random, goods: str, colour: str, size: str) -> Pair:
    ask = pick(rng, ["{}。", "要{}。", "我穿{}。"]).format(size)
    return ask, SIZE.format(colour=colour, goods=goods, size=size)


def _total(rng: Random, goods: str, colour: str, size: str) -> Pair:
    ask = pick(rng, ["帮我确认一下。", "我买的是什么？", "订单对吗？"])
    return ask, TOTAL.format(colour=colour, goods=goods, size=size)


def _goodbye(rng: Random) -> Pair:
    return pick(rng, ["谢谢", "好的，再见", "没问题了"]), GOODBYE


def conversation(rng: Random) -> list[Pair]:
    """Draw a conversation of one to five rounds, from the greeting on."""
    goods, colour, size = rng.choice(GOODS), rng.choice(COLOURS), rng.choice(SIZES)
    rounds = [_greeting(rng)] if rng.random() < 0.5 else []
    rounds += [
        _look(rng, goods),
        _colour(rng, goods, colour),
        _size(rng, goods, colour, size),
        _total(rng, goods, colour, size),
        _goodbye(rng),
    ]
    return rounds[: rng.randint(1, 5)]


def rows(salt: str, count: int) -> list[dict[str, object]]:
    """Make rows with ``prompt``, ``response`` and ``history``, as the official chat training reads them."""
    made = []
    for index in range(count):
        *history, (prompt, response) = conversation(Random(f"chat:{salt}:{index}"))
        made.append({"prompt": prompt, "response": response, "history": [list(pair) for pair in history]})
    return made


def write(folder: Path, *, train: int = 600, dev: int = 100) -> None:
    """Write ``train.jsonl`` and ``dev.jsonl``; dev rows that occur in train are left out."""
    training = rows("train", train)
    seen = {json.dumps(row, ensure_ascii=False) for row in training}
    held_out = [row for row in rows("dev", 4 * dev) if json.dumps(row, ensure_ascii=False) not in seen][:dev]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", training), ("dev", held_out)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
