"""Sums and small word problems with worked steps, in Chinese and English."""

from __future__ import annotations

from random import Random

from glmtune.tiny.corpus.sample import NAMES_EN, NAMES_ZH, Sample, chat, pick, words, worked_examples

PLACES_ZH = ("个位", "十位", "百位", "千位")
PLACES_EN = ("ones ", "tens ", "hundreds ", "thousands ")
GOODS_ZH = words("苹果 铅笔 糖果 贴纸 气球 本子 橘子 鸡蛋 书 玩具 饼干 卡片 花 邮票")
GOODS_EN = words(
    "apples pencils candies stickers balloons books oranges eggs toys cookies cards flowers stamps"
)

GAIN_ZH = (
    "{n}有{a}个{g}，又买了{b}个，现在一共有多少个？",
    "{n}原来有{a}个{g}，妈妈又给了{b}个，一共有几个{g}？",
    "盒子里有{a}个{g}，{n}又放进去{b}个，现在有多少个？",
    "{n}上午卖了{a}个{g}，下午卖了{b}个，一天卖了多少个？",
)
LOSS_ZH = (
    "{n}有{a}个{g}，送给朋友{b}个，还剩多少个？",
    "篮子里有{a}个{g}，{n}拿走了{b}个，还剩几个？",
    "{n}有{a}个{g}，用掉了{b}个，还有多少个？",
    "商店有{a}个{g}，卖出{b}个，还剩下多少个？",
)
TIMES_ZH = (
    "每盒有{a}个{g}，{n}买了{b}盒，一共有多少个？",
    "{n}每天用{a}个{g}，{b}天一共用多少个？",
    "一个{g}{a}元，{n}买了{b}个，要付多少元？",
)
SHARE_ZH = ("{n}把{a}个{g}平均分给{b}个人，每人几个？", "{a}个{g}，每{b}个装一盒，可以装几盒？")
GAIN_EN = ("{n} has {a} {g} and buys {b} more. How many {g} does {n} have now?",
           "There are {a} {g} in a box. {n} puts in {b} more. How many are in the box?",
           "{n} sold {a} {g} in the morning and {b} in the afternoon. How many in all?")  # fmt: skip
LOSS_EN = ("{n} has {a} {g} and gives away {b}. How many are left?",
           "There were {a} {g} in a shop. {n} bought {b}. How many are left?")  # fmt: skip
TIMES_EN = ("There are {a} {g} in each box. {n} buys {b} boxes. How many {g} is that?",
            "{n} uses {a} {g} a day. How many {g} are used in {b} days?")  # fmt: skip
SHARE_EN = ("{n} shares {a} {g} equally among {b} friends. How many does each get?",)

Numbers = tuple[int, int, int]


def add_columns(a: int, b: int, *, zh: bool = True) -> str:
    """Add two numbers digit by digit, from the ones on, in words.

    >>> add_columns(47, 286)
    '个位7+6=13，十位4+8+1=13，百位0+2+1=3'
    """
    steps, carry = [], 0
    for place in _places(a, b, zh=zh):
        left, right, before = a % 10, b % 10, carry
        total = left + right + before
        steps.append(f"{place}{left}+{right}" + (f"+{before}" if before else "") + f"={total}")
        a, b, carry = a // 10, b // 10, total // 10
    return _joint(zh).join(steps)


def subtract_columns(a: int, b: int, *, zh: bool = True) -> str:
    """Subtract the smaller ``b`` digit by digit, borrowing ten where a digit is too small.

    >>> subtract_columns(52, 27)
    '个位12-7=5，十位5-1-2=2'
    """
    steps, borrowed = [], 0
    for place in _places(a, b, zh=zh):
        left, right, before = a % 10, b % 10, borrowed
        borrowed = int(left - before < right)
        left += 10 * borrowed
        steps.append(
            f"{place}{left}" + (f"-{before}" if before else "") + f"-{right}={left - before - right}"
        )
        a, b = a // 10, b // 10
    return _joint(zh).join(steps)


def multiply_columns(a: int, b: int, *, zh: bool = True) -> str:
    """Multiply a number of two digits by one digit.

    >>> multiply_columns(26, 7)
    '个位6×7=42，十位2×7=14，14+4=18'
    """
    sign = "×" if zh else "*"
    ones, tens = a % 10 * b, a // 10 * b
    places = PLACES_ZH if zh else PLACES_EN
    steps = [f"{places[0]}{a % 10}{sign}{b}={ones}", f"{places[1]}{a // 10}{sign}{b}={tens}"]
    if ones >= 10:
        steps.append(f"{tens}+{ones // 10}={tens + ones // 10}")
    return _joint(zh).join(steps)


def divide_columns(a: int, b: int, *, zh: bool = True) -> str:
    """Divide by one digit without remainder, the quotient having two digits.

    >>> divide_columns(182, 7)
    '18÷7=2余4，42÷7=6'
    """
    sign, rest = ("÷", "余") if zh else ("/", " rest ")
    head, tail = a // 10, a % 10
    left = head % b
    first = f"{head}{sign}{b}={head // b}{rest}{left}" if left else f"{head}{sign}{b}={head // b}"
    return f"{first}{_joint(zh)}{left * 10 + tail}{sign}{b}={(left * 10 + tail) // b}"


def _places(a: int, b: int, *, zh: bool) -> tuple[str, ...]:
    return (PLACES_ZH if zh else PLACES_EN)[: max(len(str(a)), len(str(b)))]


def _joint(zh: bool) -> str:
    return "，" if zh else ", "


def _magnitude(rng: Random) -> int:
    return rng.choice([10, 10, 100, 100, 100, 100])


def _numbers(rng: Random, operation: str) -> Numbers:
    """Draw operands and the result of ``+``, ``-``, ``×`` or ``÷`` (without remainder)."""
    if operation == "+":
        a, b = rng.randrange(1, _magnitude(rng)), rng.randrange(1, _magnitude(rng))
        return a, b, a + b
    if operation == "-":
        a, b = sorted((rng.randrange(1, _magnitude(rng)), rng.randrange(1, _magnitude(rng))), reverse=True)
        return a, b, a - b
    a = rng.randint(2, 9 if rng.random() < 0.7 else 40)
    b = rng.randint(2, 9)
    return (a, b, a * b) if operation == "×" else (a * b, b, a)


def _worked(operation: str, numbers: Numbers, *, zh: bool) -> str:
    """Write the calculation, digit by digit before the result where an operand has several digits."""
    a, b, c = numbers
    sign = operation if zh else {"×": "*", "÷": "/"}.get(operation, operation)
    work = ""
    if operation in "+-" and max(a, b) >= 10:
        work = (add_columns if operation == "+" else subtract_columns)(a, b, zh=zh)
    elif operation == "×" and a >= 10:
        work = multiply_columns(a, b, zh=zh)
    elif operation == "÷" and c >= 10:
        work = divide_columns(a, b, zh=zh)
    return f"{work}{_joint(zh) if work else ''}{a}{sign}{b}={c}"


def _finish(worked: str, answer: int, *, zh: bool) -> str:
    return f"{worked}，答案是 {answer}。" if zh else f"{worked}. The answer is {answer}."


def bare(rng: Random) -> tuple[str, str, str]:
    """Return question, worked answer and result of one bare calculation."""
    zh = rng.random() < 0.7
    operation = rng.choice("++--×÷")
    numbers = _numbers(rng, operation)
    a, b, c = numbers
    sign = operation if zh else {"×": "*", "÷": "/"}.get(operation, operation)
    ask = pick(rng, ["{}=?", "{}等于多少？", "计算{}。"] if zh else ["What is {}?", "{} = ?"])
    return ask.format(f"{a}{sign}{b}"), _finish(_worked(operation, numbers, zh=zh), c, zh=zh), str(c)


def one_step(rng: Random) -> tuple[str, str, str]:
    """Return question, worked answer and result of a word problem with one operation."""
    zh = rng.random() < 0.6
    operation = rng.choice("++--×÷")
    table = {
        "+": (GAIN_ZH, GAIN_EN),
        "-": (LOSS_ZH, LOSS_EN),
        "×": (TIMES_ZH, TIMES_EN),
        "÷": (SHARE_ZH, SHARE_EN),
    }
    numbers = _numbers(rng, operation)
    name, goods = (
        (rng.choice(NAMES_ZH), rng.choice(GOODS_ZH)) if zh else (rng.choice(NAMES_EN), rng.choice(GOODS_EN))
    )
    ask = pick(rng, table[operation][0 if zh else 1]).format(n=name, g=goods, a=numbers[0], b=numbers[1])
    return ask, _finish(_worked(operation, numbers, zh=zh), numbers[2], zh=zh), str(numbers[2])


def two_steps(rng: Random) -> tuple[str, str, str]:
    """Return question, worked answer and result of a word problem with two operations."""
    zh = rng.random() < 0.6
    name, goods = (
        (rng.choice(NAMES_ZH), rng.choice(GOODS_ZH)) if zh else (rng.choice(NAMES_EN), rng.choice(GOODS_EN))
    )
    a, b, first = _numbers(rng, "×") if rng.random() < 0.5 else (0, 0, 0)
    if first:
        start = f"{name}买了{b}盒{goods}，每盒{a}个" if zh else f"{name} buys {b} boxes with {a} {goods} each"
        worked = _worked("×", (a, b, first), zh=zh)
    else:
        a, b = rng.randrange(5, 100), rng.randrange(1, 100)
        first = a + b
        start = f"{name}有{a}个{goods}，又得到{b}个" if zh else f"{name} has {a} {goods} and gets {b} more"
        worked = _worked("+", (a, b, first), zh=zh)
    c = rng.randrange(1, first)
    result = first - c
    ask = f"{start}，后来用掉{c}个，还剩多少个？" if zh else f"{start}. Then {c} are used. How many are left?"
    worked += _joint(zh) + _worked("-", (first, c, result), zh=zh)
    return ask, _finish(worked, result, zh=zh), str(result)


KINDS = (bare, bare, one_step, one_step, two_steps)


def arithmetic(rng: Random) -> Sample:
    """Ask one calculation or word problem in a chat."""
    ask, answer, key = pick(rng, KINDS)(rng)
    return chat("arithmetic", ask, answer, key=key)


def arithmetic_text(rng: Random) -> Sample:
    """Write several problems with worked answers."""
    items = []
    key = ""
    for _ in range(rng.randint(1, 4)):
        ask, answer, key = pick(rng, (one_step, two_steps, bare))(rng)
        cue = f"Q: {ask}\nA:" if ask.isascii() else f"问题：{ask}\n回答："
        items.append((cue, f" {answer}" if ask.isascii() else answer))
    return worked_examples(rng, "arithmetic_text", items, key)
