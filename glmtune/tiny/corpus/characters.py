"""Which characters glm-tiny can read and write, and the exercises that teach every one of them."""

from __future__ import annotations

import string
from functools import cache
from random import Random

from glmtune.tiny.corpus.sample import Sample, chat, pick

PUNCTUATION = "，。、；：？！…—·“”‘’（）《》〈〉【】「」『』～￥％＋－＝＃＊＆／　"
MATHEMATICS = "×÷±≤≥≠≈∞√∑∫∂π°′″²³¹⁰αβγδεθλμρσφωΔΩΣ∈∩∪→←↑↓℃∠△⊥①②③④⑤⑥⑦⑧⑨ⅠⅡⅢ"
BEYOND_LEVEL_1 = (
    "褶魅髦镂慵皙羁踝靓朦胧妩诠潇衩渲窈窕媛珑蝙蝠惬栩翩炫婀沓酯尴尬姣裆袢橘摒睐哒糅咪谧熠怡飒缤噢瑕邃遐娆"
    "璀璨矜邂逅馨飙缥缈怦呦熨芙犷萦娴苎邋遢愫貂隽蜿璞媲恣喵沐鹦鹉煦嫣漪嘟冽婷迥翡嗲眸嗯斓绮骷髅柚佼妞腴奕"
    "麒麟裾薇茜楠晗琪玥烨琳钰咖啡蟾蜍酰鲁迅曹禺荀孟轼冼祖昇瑜懿琵琶饪嵌囊邕讷亳衢漯泸圳坤沂淄邯郸"
)


SPANS = (300, 10_000, 10_000, 10_000)
"""From how many characters a random string is drawn; the last means all."""


@cache
def chinese_characters() -> str:
    """Return the 3,755 characters of GB2312 level 1 in code order, then a few rarer ones.

    >>> len(chinese_characters()) > 3800 and chinese_characters()[0]
    '啊'
    """
    level_1 = []
    for high in range(0xB0, 0xD8):
        for low in range(0xA1, 0xFF):
            if high == 0xD7 and low > 0xF9:
                break
            level_1.append(bytes([high, low]).decode("gb2312"))
    known = set(level_1)
    return "".join(level_1) + "".join(dict.fromkeys(c for c in BEYOND_LEVEL_1 if c not in known))


@cache
def required_characters() -> str:
    """Return every character the tokenizer must hold as a piece of its own."""
    printable = "".join(c for c in string.printable if c.isprintable() and c != " ")
    return "".join(
        dict.fromkeys(printable + PUNCTUATION.replace("\u3000", "") + MATHEMATICS + chinese_characters())
    )


@cache
def _shuffled_characters() -> str:
    characters = list(chinese_characters())
    Random(0).shuffle(characters)
    return "".join(characters)


def random_string(rng: Random, length: int) -> str:
    """Draw ``length`` Chinese characters, mostly from all: from a few, copying would be learnt by heart."""
    few = _shuffled_characters()[: rng.choice(SPANS)]
    return "".join(rng.choices(few, k=length))


def _mixed(rng: Random, length: int) -> str:
    if rng.random() < 0.35:
        alphabet = rng.choice(
            [string.ascii_lowercase, string.ascii_uppercase, string.digits, MATHEMATICS, PUNCTUATION[:-1]]
        )
        return "".join(rng.choices(alphabet, k=length))
    return random_string(rng, length)


def copy(rng: Random) -> Sample:
    """Repeat a string of random characters."""
    text = _mixed(rng, rng.randint(3, 20))
    ask = pick(
        rng, ["请复述：{}", "照抄下面的文字：{}", "跟我说：{}", "Repeat: {}", "把下面的字原样写出来：{}"]
    )
    return chat("strings", ask.format(text), text, key=text)


def pattern(rng: Random) -> Sample:
    """Continue a repeated pattern in plain text."""
    unit = _mixed(rng, rng.randint(3, 12))
    return Sample("strings", text=rng.choice(["", " ", "，"]).join([unit] * rng.randint(3, 5)))


def table(rng: Random) -> Sample:
    """Look a value up in a small list of pairs."""
    count = rng.randint(3, 6)
    keys = [random_string(rng, rng.randint(1, 2)) for _ in range(count)]
    values = [random_string(rng, rng.randint(1, 4)) for _ in range(count)]
    chosen = rng.randrange(count)
    listing = "*".join(f"{k}#{v}" for k, v in zip(keys, values, strict=True))
    if rng.random() < 0.5:
        return chat("strings", f"{listing}\n{keys[chosen]}是什么？", values[chosen], key=values[chosen])
    answer = "，".join(f"{k}是{v}" for k, v in zip(keys, values, strict=True)) + "。"
    return chat("strings", f"{listing}\n逐条说明。", answer, key=answer)


EXERCISES = (copy, copy, pattern, table, table)


def strings(rng: Random) -> Sample:
    """Draw one exercise on random characters."""
    return pick(rng, EXERCISES)(rng)


def copying(rng: Random) -> Sample:
    """Write a string of any characters several times."""
    length = rng.randint(3, 16)
    line = "".join(rng.choices(_shuffled_characters(), k=length))
    return Sample("copying", text="\n".join([line] * max(2, 40 // (length + 1))))
