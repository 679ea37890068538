"""Short chats in Chinese and English, one to three rounds, where later rounds lean on earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from glmtune.tiny.corpus.arithmetic import bare, one_step
from glmtune.tiny.corpus.facts import Fact, all_facts, draw_fact
from glmtune.tiny.corpus.sample import COLOURS, NAMES_EN, NAMES_ZH, Sample, chat, lexicon, pick, words

Turns = tuple[str, ...]
CITIES_ZH = words("北京 上海 广州 成都 杭州 西安 南京 武汉 重庆 天津 苏州 长沙")
FOODS_ZH = words("饺子 面条 米饭 火锅 西瓜 苹果 包子 豆腐 鱼 鸡蛋")
JOBS_ZH = words("老师 医生 司机 厨师 工人 学生 警察 律师 农民 画家")


def small_talk(rng: Random) -> Turns:
    """Answer one phrase of ``lexicon/chat.yaml``."""
    intent = pick(rng, lexicon("chat"))
    return pick(rng, intent["ask"].split(" | ")), intent["say"]


def remember_name(rng: Random) -> Turns:
    """Give a name, be asked for it later."""
    if rng.random() < 0.35:
        name = rng.choice(NAMES_EN)
        return (
            f"My name is {name}.",
            f"Nice to meet you, {name}!",
            "What is my name?",
            f"Your name is {name}.",
        )
    name = rng.choice(NAMES_ZH)
    ask = pick(rng, ["我叫什么名字？", "你还记得我的名字吗？", "我是谁？"])
    return f"我叫{name}。", f"你好，{name}！很高兴认识你。", ask, f"你叫{name}。"


def remember_thing(rng: Random) -> Turns:
    """State something about oneself, be asked for it later."""
    kind, values, state, ask, say = pick(rng, [
        ("城市", CITIES_ZH, "我住在{}。", "我住在哪里？", "你住在{}。"),
        ("食物", FOODS_ZH, "我喜欢吃{}。", "我喜欢吃什么？", "你喜欢吃{}。"),
        ("工作", JOBS_ZH, "我是一名{}。", "我是做什么的？", "你是一名{}。"),
        ("颜色", list(COLOURS), "我最喜欢{}。", "我最喜欢什么颜色？", "你最喜欢{}。"),
    ])  # fmt: skip
    value = rng.choice(values)
    first = (state.format(value), f"好的，我记住了，你的{kind}是{value}。")
    middle = small_talk(rng) if rng.random() < 0.4 else ()
    return (*first, *middle, ask, say.format(value))


def _ask(rng: Random, fact: Fact) -> Turns:
    return pick(rng, fact.ask), fact.say


def follow_up(rng: Random) -> Turns:
    """Ask the same kind of question again in short form."""
    relation = next(rows for rows in all_facts()["zh"] if rng.random() < 0.2 or rows is all_facts()["zh"][-1])
    first, second = rng.sample(relation, 2)
    subject = pick(rng, second.ask)
    return (*_ask(rng, first), f"那么，{subject}", second.say)


def two_questions(rng: Random) -> Turns:
    """Ask two unrelated things."""
    return (*_one(rng), *_one(rng))


def _one(rng: Random) -> Turns:
    kind = rng.random()
    if kind < 0.4:
        return small_talk(rng)
    if kind < 0.8:
        return _ask(rng, draw_fact(rng, "zh" if rng.random() < 0.7 else "en"))
    return pick(rng, (bare, one_step))(rng)[:2]


def add_more(rng: Random) -> Turns:
    """Go on calculating from the last result."""
    a, b, c = rng.randrange(1, 50), rng.randrange(1, 50), rng.randrange(1, 30)
    first = (f"{a}+{b}等于多少？", f"{a}+{b}={a + b}，答案是 {a + b}。")
    return (*first, f"再加{c}呢？", f"{a + b}+{c}={a + b + c}，答案是 {a + b + c}。")


def repeat_earlier(rng: Random) -> Turns:
    """Repeat what was said before."""
    ask, say = _one(rng)
    if rng.random() < 0.5:
        return ask, say, "请把你的回答再说一遍。", say
    return ask, say, "我刚才问了什么？", f"你刚才说：{ask}"


KINDS: tuple[Callable[[Random], Turns], ...] = (
    small_talk, small_talk, small_talk, remember_name, remember_thing, follow_up, two_questions, add_more,
    repeat_earlier,
)  # fmt: skip


def conversation(rng: Random) -> Sample:
    """Draw a chat of one to three rounds."""
    turns = pick(rng, KINDS)(rng)
    return chat("chat", *turns, key=turns[-1])
