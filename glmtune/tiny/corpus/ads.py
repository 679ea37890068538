"""Attribute lists and the advertisements they become, short and long.

The words of the short ones stand in ``lexicon/ads.yaml``; those of the long ones in ``lexicon/clauses.yaml``
(about an attribute) and ``lexicon/sentences.yaml`` (about a garment in general).
"""

from __future__ import annotations

from functools import cache
from random import Random

from glmtune.tiny.corpus.characters import random_string
from glmtune.tiny.corpus.sample import Sample, chat, lexicon, pick

Attributes = list[tuple[str, str]]
VALUE_TO_PROSE = 0.75
"""Share of values put into words of their own, where there are some; others are named as they are."""
UNKNOWN_VALUES = 0.15
"""Share of values that are replaced by random characters."""
REQUESTS = (
    "为下面的商品写广告：\n{}",
    "{}\n写成广告。",
    "请根据这些属性写一段广告：\n{}",
    "{}\n请写一段商品文案。",
)
REPLIES = ("{}的属性我看到了，要写成广告吗？", "收到{}的属性，需要我做什么？")
CONSENTS = ("要。", "写成广告吧。", "好，写一段广告。")
JOINTS = ("，", "，", "，", "，", "。", "；", "。同时", "，而且", "，再加上")


@cache
def value_names() -> dict[str, tuple[str, ...]]:
    """Return the values every attribute can take, common ones first."""
    words = lexicon("ads")
    names: dict[str, tuple[str, ...]] = {}
    for key in words["fallback"]:
        names[key] = (*words["values"].get(key, {}), *words["only_fallback"].get(key, ()))
    for key, original in words["same"].items():
        names[key] = names[original]
    return names


def draw_attributes(rng: Random, *, fewest: int = 3, most: int = 8) -> Attributes:
    """Draw a garment: its type and some attributes with values, in the usual order of such lists.

    Args:
        rng: source of randomness.
        fewest: smallest number of pairs, the type included.
        most: largest number of pairs.

    Returns:
        Pairs of attribute and value; the first is the type. Style, pattern and detail may repeat.
    """
    words = lexicon("ads")
    garment = rng.choice(list(words["types"]))
    keys = words["types"][garment]
    wanted = rng.randint(fewest, most) - 1
    chosen = sorted(rng.sample(range(len(keys)), min(wanted, len(keys))))
    pairs: Attributes = [("类型", garment)]
    for index in chosen:
        key = keys[index]
        times = 2 if key[-2:] in ("图案", "风格", "款式") and rng.random() < 0.2 else 1
        seen = {pick(rng, value_names()[key], skew=0.7) for _ in range(times)}
        pairs += [(key, value) for value in sorted(seen)]
    return pairs


def content(pairs: Attributes) -> str:
    """Write attributes the way AdvertiseGen does.

    >>> content([("类型", "裙"), ("颜色", "红色")])
    '类型#裙*颜色#红色'
    """
    return "*".join(f"{key}#{value}" for key, value in pairs)


def clause(rng: Random, key: str, value: str) -> str:
    """Word one attribute as a clause without final punctuation."""
    words = lexicon("ads")
    key = words["same"].get(key, key)
    special = words["values"].get(key, {}).get(value)
    if special and rng.random() < VALUE_TO_PROSE:
        return pick(rng, special)
    return pick(rng, words["fallback"][key]).format(v=value)


def advertisement(rng: Random, pairs: Attributes) -> str:
    """Write connected prose that mentions every attribute."""
    words = lexicon("ads")
    noun = pick(rng, words["nouns"][pairs[0][1]][:1])
    rest = pairs[1:]
    styles = [pair for pair in rest if pair[0] in ("风格", "版型", "颜色") and len(pair[1]) < 4]
    if styles and rng.random() < 0.5:
        first = rng.choice(styles)
        rest = [pair for pair in rest if pair != first]
        text = pick(rng, words["opening"]).format(v=first[1], t=noun)
    else:
        text = pick(rng, words["plain_opening"]).format(t=noun)
    for index, (key, value) in enumerate(rest):
        joint = "，" if index == 0 else pick(rng, words["connectors"])
        text += joint + clause(rng, key, value)
    if rng.random() < 0.7:
        text += pick(rng, ["，", "。"]) + pick(rng, words["closing"])
    return text + "。"


def long_advertisement(rng: Random, pairs: Attributes) -> str:
    """Write a paragraph that mentions every attribute between sentences about the garment in general."""
    clauses, sentences = lexicon("clauses"), lexicon("sentences")
    aliases = lexicon("ads")["same"]

    def about(theme: str) -> str:
        return pick(rng, sentences[rng.choice([pairs[0][1], "any"])][theme])

    rest = pairs[1:]
    rng.shuffle(rest)
    text = about("opening")
    for key, value in rest:
        text += pick(rng, JOINTS) + pick(rng, clauses[aliases.get(key, key)]).format(v=value)
        if rng.random() < 0.3:
            text += pick(rng, JOINTS) + about(pick(rng, ["effect", "effect", "detail"]))
    for theme in rng.sample(["effect", "occasion", "matching", "closing"], rng.randint(0, 2)):
        text += pick(rng, ["，", "。"]) + about(theme)
    return text + pick(rng, ["。", "。", "！"])


def ads_long(rng: Random) -> Sample:
    """Ask for a long advertisement."""
    pairs = draw_attributes(rng, fewest=2, most=7)
    ask = pick(rng, ["{}\n写详细一点。", "详细介绍下面的商品：\n{}", "{}\n请写一段长文案。"]).format(
        content(pairs)
    )
    return chat("ads_long", ask, long_advertisement(rng, pairs), key=_values(pairs))


def _with_unknown_values(rng: Random, pairs: Attributes) -> Attributes:
    """Replace some values by random characters: what an attribute is called must be read, not remembered."""
    return [
        pairs[0],
        *(
            (key, random_string(rng, rng.randint(2, 3)) if rng.random() < UNKNOWN_VALUES else value)
            for key, value in pairs[1:]
        ),
    ]


def _values(pairs: Attributes) -> str:
    return "|".join(value for _, value in pairs[1:])


def ads(rng: Random) -> Sample:
    """Ask for an advertisement of an attribute list, or for a sentence about one attribute."""
    pairs = _with_unknown_values(rng, draw_attributes(rng))
    if rng.random() < 0.1:
        key, value = rng.choice(pairs[1:])
        return chat(
            "ads", f"{content(pairs)}\n用一句话介绍{key}。", clause(rng, key, value) + "。", key=value
        )
    ask = pick(rng, REQUESTS).format(content(pairs))
    return chat("ads", ask, advertisement(rng, pairs), key=_values(pairs))


def bare_list(rng: Random) -> Sample:
    """Show an attribute list and ask for nothing: the answer asks back, and sometimes the request follows."""
    pairs = draw_attributes(rng)
    noun = lexicon("ads")["nouns"][pairs[0][1]][1]
    reply = pick(rng, REPLIES).format(noun)
    turns = [content(pairs), reply]
    if rng.random() < 0.4:
        turns += [rng.choice(CONSENTS), advertisement(rng, pairs)]
    return chat("ads_bare", *turns, key=turns[-1])
