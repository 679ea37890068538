"""Questions about the small facts of ``lexicon/facts.yaml``: open, four options, yes or no, few-shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from glmtune.tiny.corpus.sample import LETTERS, Sample, chat, lexicon, pick

RARITY = 0.6
"""Skew of the draw (see `pick`): common facts stand first in the lexicon, and are to be known best."""
LETTER_ONLY_ZH = ("只回答选项字母。", "只写字母。")
LETTER_ONLY_EN = ("Answer with the letter only.", "Give only the letter.")
EXTRACT_ZH = ("综上所述，ABCD中正确的选项是：", "所以正确的选项是：")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact in one language.

    Attributes:
        language: ``zh`` or ``en``.
        subject: the school subject, in that language.
        ask: ways to ask.
        say: the answer as a sentence.
        answer: the object alone.
        others: objects of the same relation that are wrong here.
    """

    language: str
    subject: str
    ask: tuple[str, ...]
    say: str
    answer: str
    others: tuple[str, ...]


def _one_language(relation: Mapping[str, Any], language: str, rows: list[list[str]]) -> list[Fact]:
    subject = relation["subject"][0 if language == "en" else 1]
    swap = language == "en" and relation.get("swap_en", False)
    objects = dict.fromkeys(row[0] if swap else row[1] for row in rows)
    facts = []
    for a, b in rows:
        answer = a if swap else b
        ask = tuple(text.format(a=a, b=b) for text in relation[f"ask_{language}"])
        others = tuple(value for value in objects if value != answer)
        say = relation[f"say_{language}"].format(a=a, b=b)
        facts.append(Fact(language, subject, ask, say[0].upper() + say[1:], answer, others))
    return facts


@cache
def all_facts() -> dict[str, tuple[tuple[Fact, ...], ...]]:
    """Return the facts by language (``zh``, ``en``), each a tuple of relations."""
    found: dict[str, list[tuple[Fact, ...]]] = {"zh": [], "en": []}
    for relation in lexicon("facts"):
        rows = [row.split("|") for row in relation["rows"]]
        for language in ("zh", "en"):
            if f"ask_{language}" not in relation:
                continue
            # Rows of four hold both languages: Chinese first, English behind it.
            columns = slice(2, 4) if language == "en" and len(rows[0]) == 4 else slice(0, 2)
            found[language].append(tuple(_one_language(relation, language, [row[columns] for row in rows])))
    return {language: tuple(relations) for language, relations in found.items()}


def draw_fact(rng: Random, language: str) -> Fact:
    """Draw a fact; later rows of a relation come up less often."""
    relations = all_facts()[language]
    relation = rng.choices(relations, weights=[len(rows) ** 0.7 for rows in relations])[0]
    return pick(rng, relation, skew=RARITY)


def question(rng: Random) -> Sample:
    """Ask a fact openly."""
    fact = draw_fact(rng, "zh" if rng.random() < 0.65 else "en")
    ask = pick(rng, fact.ask)
    if rng.random() < 0.15:
        short = "只回答结果。" if fact.language == "zh" else " Answer briefly."
        return chat("facts", ask + short, fact.answer, key=fact.answer)
    return chat("facts", ask, fact.say, key=fact.answer)


@dataclass(frozen=True, slots=True)
class FourOptions:
    """A question with four options: ``block`` is the text to ask, ``letter`` the right one."""

    ask: str
    options: tuple[str, ...]
    letter: str
    say: str

    def block(self, style: str = "A. ") -> str:
        """Return the question and its options, one per line, labelled in ``style``."""
        lines = [
            style.replace("A", letter) + text for letter, text in zip(LETTERS, self.options, strict=True)
        ]
        return "\n".join([self.ask, *lines])


def draw_options(rng: Random, fact: Fact) -> FourOptions:
    """Give a fact three wrong options and shuffle."""
    options = [fact.answer, *rng.sample(fact.others, 3)]
    rng.shuffle(options)
    return FourOptions(pick(rng, fact.ask), tuple(options), LETTERS[options.index(fact.answer)], fact.say)


def _matching(rng: Random) -> Sample:
    """Teach how letters belong to lines, without any knowledge."""
    zh = rng.random() < 0.6
    fact = draw_fact(rng, "zh" if zh else "en")
    options = rng.sample([fact.answer, *fact.others], 4)
    index = rng.randrange(4)
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True))
    if rng.random() < 0.4:
        ask = f"{LETTERS[index]}选项是什么？\n{lines}" if zh else f"What is option {LETTERS[index]}?\n{lines}"
        return chat("choice", ask, options[index], key=options[index])
    ask = (
        f"哪个选项是“{options[index]}”？\n{lines}" if zh else f'Which option is "{options[index]}"?\n{lines}'
    )
    return chat("choice", ask, LETTERS[index], key=LETTERS[index])


def _usable(rng: Random, language: str) -> Fact:
    while len((fact := draw_fact(rng, language)).others) < 3:
        pass
    return fact


def choice(rng: Random) -> Sample:
    """Ask a fact with four options in a chat."""
    if rng.random() < 0.4:
        return _matching(rng)
    zh = rng.random() < 0.6
    fact = _usable(rng, "zh" if zh else "en")
    item = draw_options(rng, fact)
    block = item.block("A. ")
    kind = rng.random()
    if kind < 0.3:
        only = pick(rng, LETTER_ONLY_ZH if zh else LETTER_ONLY_EN)
        ask = f"{block}\n{only}" if rng.random() < 0.7 else f"{only}\n{block}"
        return chat("choice", ask, item.letter, key=item.letter)
    if kind < 0.45 and zh:
        spoken = f"{item.say[:-1]}，所以答案是 {item.letter}。"
        return chat("choice", f"{block}{spoken}\n{pick(rng, EXTRACT_ZH)}", item.letter, key=item.letter)
    if zh:
        head = pick(rng, ["", "", f"下面是一道{fact.subject}单项选择题。\n"])
        return chat("choice", head + block, f"{item.say[:-1]}，所以答案是 {item.letter}。", key=item.letter)
    return chat("choice", block, f"{item.say} The answer is {item.letter}.", key=item.letter)


def _header(rng: Random, fact: Fact) -> str:
    if fact.language == "zh":
        heads = [
            f"以下是关于{fact.subject}考试的单项选择题，请选出正确答案。\n\n",
            f"{fact.subject}选择题\n\n",
            "",
        ]
    else:
        heads = [f"These are multiple choice questions about {fact.subject}, with answers.\n\n", ""]
    return pick(rng, heads)


def few_shot(rng: Random, *, shots: int | None = None) -> Sample:
    """Write several four-option questions with their letters as plain text.

    Args:
        rng: source of randomness.
        shots: worked examples before the last question; None draws 0 to 3.

    Returns:
        A plain-text sample; ``key`` is the last letter, which is also the text's end.
    """
    language = "zh" if rng.random() < 0.6 else "en"
    cue = "答案：" if language == "zh" else "Answer: "
    facts = [_usable(rng, language) for _ in range(1 + (rng.randint(0, 3) if shots is None else shots))]
    items = [draw_options(rng, fact) for fact in facts]
    text = _header(rng, facts[0]) + "\n\n".join(f"{item.block()}\n{cue}{item.letter}" for item in items)
    return Sample("choice_text", text=text, key=items[-1].letter)


def yes_no(rng: Random) -> Sample:
    """Say whether a statement about a fact is right."""
    zh = rng.random() < 0.6
    fact = draw_fact(rng, "zh" if zh else "en")
    right = rng.random() < 0.5 or not fact.others
    said = fact.say if right else fact.say.replace(fact.answer, rng.choice(fact.others))
    if zh:
        ask = pick(rng, ["判断对错：{}", "下面的说法对吗？{}"]).format(said)
        return chat("facts", ask, "对。" if right else f"不对。{fact.say}", key="对" if right else "不对")
    return chat(
        "facts",
        f"Is this right? {said}",
        "Yes." if right else f"No. {fact.say}",
        key="Yes" if right else "No",
    )


def few_shot_open(rng: Random, *, languages: Sequence[str] = ("zh", "en")) -> Sample:
    """Write several open questions and answers as plain text."""
    language = rng.choice(languages)
    marks = ("问题：", "回答：") if language == "zh" else ("Q: ", "A: ")
    facts = [draw_fact(rng, language) for _ in range(rng.randint(1, 4))]
    blocks = [f"{marks[0]}{pick(rng, fact.ask)}\n{marks[1]}{fact.say}" for fact in facts]
    return Sample("facts_text", text="\n\n".join(blocks), key=facts[-1].answer)


def facts(rng: Random) -> Sample:
    """Draw an open or a yes-no question."""
    return yes_no(rng) if rng.random() < 0.25 else question(rng)
