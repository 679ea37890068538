"""Small reasoning exercises of the kinds BBH has, in our own words."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import pairwise
from random import Random

from glmtune.tiny.corpus.sample import COLOURS, NAMES_EN, THINGS, Sample, chat, pick, words, worked_examples

Exercise = tuple[str, str, str]
WORDS = words(
    "apple banana candle dragon engine forest garden hammer island jacket kitten ladder mirror "
    "needle orange pepper quiver rabbit salmon tunnel umbrella violin window yellow zebra anchor bridge "
    "copper desert eagle flower guitar helmet insect jungle kettle lemon magnet north ocean planet river "
    "silver tiger valley whale"
)


def boolean(rng: Random) -> Exercise:
    """Evaluate an expression of True, False, not, and, or."""

    def leaf() -> str:
        return pick(rng, ["", "", "not "]) + pick(rng, ["True", "False"])

    def side() -> str:
        return f"( {leaf()} {pick(rng, ['and', 'or'])} {leaf()} )" if rng.random() < 0.4 else leaf()

    text = pick(rng, ["", "", "not "]) + side()
    for _ in range(rng.randint(1, 2)):
        text += f" {pick(rng, ['and', 'or'])} {side()}"
    # An expression of this function's own words: True, False, not, and, or, brackets.
    result = str(eval(text, {"__builtins__": {}}))
    return f"{text} is", f"So the answer is {result}.", result


def word_sorting(rng: Random) -> Exercise:
    """Sort a few words by their letters."""
    words = rng.sample(WORDS, rng.randint(2, 6))
    result = " ".join(sorted(words))
    return f"Sort the words alphabetically: {' '.join(words)}", f"The answer is {result}.", result


def _options(rng: Random, right: str, wrong: list[str]) -> tuple[str, str]:
    choices = [right, *wrong]
    rng.shuffle(choices)
    lines = "\n".join(f"({'ABCDEF'[index]}) {text}" for index, text in enumerate(choices))
    return f"Options:\n{lines}", f"({'ABCDEF'[choices.index(right)]})"


def dates(rng: Random) -> Exercise:
    """Move a date by a few days and choose it among options."""
    today = date(rng.randint(2000, 2030), rng.randint(1, 12), rng.randint(1, 28))
    shift, word = pick(
        rng, [(1, "tomorrow"), (-1, "yesterday"), (7, "a week from today"), (2, "in two days")]
    )
    right = today + timedelta(days=shift)
    wrong = {
        right + timedelta(days=step) for step in rng.sample([-31, -7, -3, -2, -1, 1, 2, 3, 7, 31, 365], 3)
    }
    block, letter = _options(rng, f"{right:%m/%d/%Y}", [f"{day:%m/%d/%Y}" for day in sorted(wrong)])
    ask = f"Today is {today:%m/%d/%Y}. What is the date {word}?\n{block}"
    return ask, f"The date is {right:%m/%d/%Y}. So the answer is {letter}.", letter


def coloured_objects(rng: Random) -> Exercise:
    """Find the colour of a thing, or how many things have a colour."""
    zh = rng.random() < 0.5
    things = rng.sample(list(THINGS), rng.randint(2, 5))
    colours = [rng.choice(list(COLOURS)) for _ in things]
    index = rng.randrange(len(things))
    if zh:
        listing = "、".join(f"{colour}的{thing}" for colour, thing in zip(colours, things, strict=True))
        if rng.random() < 0.5:
            return (
                f"桌上有{listing}。{things[index]}是什么颜色的？",
                f"{things[index]}是{colours[index]}的。",
                colours[index],
            )
        count = str(colours.count(colours[index]))
        return f"桌上有{listing}。{colours[index]}的东西有几样？", f"有{count}样。", count
    names = [f"a {COLOURS[colour]} {THINGS[thing]}" for colour, thing in zip(colours, things, strict=True)]
    if rng.random() < 0.5:
        right = COLOURS[colours[index]]
        wrong = rng.sample([colour for colour in COLOURS.values() if colour != right], 3)
        block, letter = _options(rng, right, wrong)
        ask = (
            f"On the table there are {', '.join(names)}. What colour is the {THINGS[things[index]]}?\n{block}"
        )
        return ask, f"The {THINGS[things[index]]} is {right}. So the answer is {letter}.", letter
    count = str(colours.count(colours[index]))
    ask = f"I see {', '.join(names)}. How many things are {COLOURS[colours[index]]}?"
    return ask, f"So the answer is {count}.", count


def _plural(thing: str) -> str:
    return thing + ("es" if thing.endswith(("x", "ch")) else "s")


def object_counting(rng: Random) -> Exercise:
    """Add up small numbers of things."""
    things = rng.sample(list(THINGS.values()), rng.randint(2, 5))
    counts = [rng.randint(1, 4) for _ in things]
    names = []
    for count, thing in zip(counts, things, strict=True):
        names.append(
            f"{count} {_plural(thing)}" if count > 1 else f"{'an' if thing[0] == 'u' else 'a'} {thing}"
        )
    total, steps = 0, []
    for count in counts:
        total += count
        steps.append(str(total))
    ask = f"I have {', '.join(names[:-1])} and {names[-1]}. How many objects do I have?"
    return ask, f"Counting: {', '.join(steps)}. So the answer is {total}.", str(total)


def navigate(rng: Random) -> Exercise:
    """Decide whether steps forward and backward lead home."""
    steps = [(rng.randint(1, 5), rng.choice(["forward", "backward"])) for _ in range(rng.randint(2, 3))]
    where = sum(count if way == "forward" else -count for count, way in steps)
    if rng.random() < 0.5 and where:
        steps.append((abs(where), "backward" if where > 0 else "forward"))
        where = 0
    walk = ". ".join(f"Take {count} step{'s' * (count > 1)} {way}" for count, way in steps)
    place, trace = 0, []
    for count, way in steps:
        place += count if way == "forward" else -count
        trace.append(str(place))
    result = "No" if where else "Yes"
    return f"{walk}. Are you back at the start?", f"{', '.join(trace)}. So the answer is {result}.", result


def lying(rng: Random) -> Exercise:
    """Follow who tells the truth through a short chain."""
    people = rng.sample(NAMES_EN, rng.randint(2, 3))
    truth = [rng.random() < 0.5]
    text = f"{people[0]} {'tells the truth' if truth[0] else 'lies'}."
    for before, name in pairwise(people):
        says = rng.random() < 0.5
        truth.append(says == truth[-1])
        text += f" {name} says {before} {'tells the truth' if says else 'lies'}."
    result = "Yes" if truth[-1] else "No"
    trace = ", ".join(
        f"{name} {'tells the truth' if t else 'lies'}" for name, t in zip(people, truth, strict=True)
    )
    return f"{text} Does {people[-1]} tell the truth?", f"{trace}. So the answer is {result}.", result


KINDS = (boolean, word_sorting, dates, coloured_objects, object_counting, navigate, lying)


def reasoning(rng: Random) -> Sample:
    """Ask one exercise in a chat."""
    ask, answer, key = pick(rng, KINDS)(rng)
    return chat("reasoning", ask, answer, key=key)


def reasoning_text(rng: Random) -> Sample:
    """Write several exercises of one kind with their answers."""
    kind = pick(rng, KINDS)
    drawn = [kind(rng) for _ in range(rng.randint(1, 4))]
    cue, joint = pick(rng, [("A:", " "), ("A: Let's think step by step.", "\n")])
    items = [(f"Q: {ask}\n{cue}", f"{joint}{answer}") for ask, answer, _ in drawn]
    return worked_examples(rng, "reasoning_text", items, drawn[-1][2])
