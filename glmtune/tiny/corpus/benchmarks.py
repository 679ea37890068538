"""Small sample sets in the official layouts of C-Eval, MMLU, GSM8K and BBH, about what glm-tiny is taught.

Every question comes from this package's own lexicons and exercises; none is from a real benchmark.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from random import Random

from glmtune.tiny.corpus import arithmetic, reasoning
from glmtune.tiny.corpus.facts import Fact, FourOptions, all_facts, draw_options
from glmtune.tiny.corpus.sample import LETTERS, lexicon

SALT = "benchmark"
DEV, QUESTIONS = 5, 15
PROBLEMS, SHOTS = 60, 8
ITEMS, TASK_SHOTS = 20, 3
CEVAL = {
    "high_school_geography": ("capital", "continent", "province"),
    "high_school_chemistry": ("symbol", "formula"),
    "high_school_biology": ("animal_class", "organ"),
    "chinese_language_and_literature": ("poet", "opposite", "idiom"),
}
MMLU = {
    "high_school_geography": ("capital", "continent"),
    "high_school_chemistry": ("symbol", "formula"),
    "high_school_biology": ("animal_class", "organ"),
    "miscellaneous": ("howmany", "colour", "maker"),
}
BBH: dict[str, tuple[str, Callable[[Random], reasoning.Exercise]]] = {
    "date_understanding": ("Find a date a few days away.", reasoning.dates),
    "navigate": ("Say whether a walk leads back to its start.", reasoning.navigate),
    "object_counting": ("Count things.", reasoning.object_counting),
    "reasoning_about_colored_objects": ("Find the colour of a thing.", reasoning.coloured_objects),
    "web_of_lies": ("Say who tells the truth.", reasoning.lying),
    "word_sorting": ("Sort words by their letters.", reasoning.word_sorting),
}
OPTION_TASKS = ("date_understanding", "reasoning_about_colored_objects")
NOTICE = "Written for glmtune; no item of BIG-Bench Hard is among these."
Problem = tuple[str, str, str]
Files = dict[str, str]


def _facts(language: str, relations: Sequence[str]) -> list[Fact]:
    names = [relation["name"] for relation in lexicon("facts") if f"ask_{language}" in relation]
    by_name = dict(zip(names, all_facts()[language], strict=True))
    return [fact for name in relations for fact in by_name[name] if len(fact.others) >= 3]


def _questions(benchmark: str, subject: str, facts: Sequence[Fact]) -> list[FourOptions]:
    """Draw different facts, and for each a question with four options."""
    rng = Random(f"{SALT}:{benchmark}:{subject}")
    return [draw_options(rng, fact) for fact in rng.sample(facts, DEV + QUESTIONS)]


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def ceval() -> Files:
    """Return the files of the C-Eval sample set: five explained dev rows and 15 val rows a subject."""
    files: Files = {}
    head = ["id", "question", *LETTERS, "answer"]
    for subject, relations in CEVAL.items():
        items = _questions("ceval", subject, _facts("zh", relations))
        dev = [
            [index, item.ask, *item.options, item.letter, item.say] for index, item in enumerate(items[:DEV])
        ]
        val = [[index, item.ask, *item.options, item.letter] for index, item in enumerate(items[DEV:])]
        files[f"dev/{subject}_dev.csv"] = _csv([[*head, "explanation"], *dev])
        files[f"val/{subject}_val.csv"] = _csv([head, *val])
    return files | _description({"dev": dict.fromkeys(CEVAL, DEV), "val": dict.fromkeys(CEVAL, QUESTIONS)})


def mmlu() -> Files:
    """Return the files of the MMLU sample set: five dev rows and 15 test rows a subject, no header line."""
    files: Files = {}
    for subject, relations in MMLU.items():
        items = _questions("mmlu", subject, _facts("en", relations))
        rows = [[item.ask, *item.options, item.letter] for item in items]
        files[f"dev/{subject}_dev.csv"] = _csv(rows[:DEV])
        files[f"test/{subject}_test.csv"] = _csv(rows[DEV:])
    return files | _description({"dev": dict.fromkeys(MMLU, DEV), "test": dict.fromkeys(MMLU, QUESTIONS)})


def _problems(salt: str, *, zh: bool) -> Iterator[Problem]:
    """Yield different word problems in one language with their worked answers and results."""
    seen: set[str] = set()
    for number in count():
        rng = Random(f"{SALT}:{salt}:{number}")
        ask, worked, result = rng.choice([arithmetic.one_step, arithmetic.two_steps])(rng)
        # Exercises come in either language; English ones are ASCII throughout, Chinese ones never.
        if ask.isascii() != zh and ask not in seen:
            seen.add(ask)
            yield ask, worked, result


def _steps(worked: str) -> str:
    return re.split(r"[.，] ?(?:The answer is|答案是)", worked)[0]


def gsm8k() -> Files:
    """Return the files of the GSM8K sample set: eight exemplars and 60 problems."""
    problems = _problems("gsm8k", zh=False)
    shots = [{"question": ask, "target": worked} for ask, worked, _ in islice(problems, SHOTS)]
    rows = [
        {"question": ask, "answer": f"{_steps(worked)}\n#### {result}"}
        for ask, worked, result in islice(problems, PROBLEMS)
    ]
    files = {"cot_prompt_8shot.json": _pretty(shots), "test.jsonl": _json_lines(rows)}
    return files | _description({"test": {"gsm8k": PROBLEMS}})


def gsm8k_zh() -> Files:
    """Return the files of the Chinese sample set: eight exemplars in MGSM's form and 60 problems."""
    problems = _problems("gsm8k_zh", zh=True)
    shots = {
        str(number): {"q": f"问题：{ask}", "a": f"逐步解答：{worked}"}
        for number, (ask, worked, _) in enumerate(islice(problems, SHOTS), start=1)
    }
    rows = [
        {"question": ask, "answer": f"#### {result}", "id": index}
        for index, (ask, _, result) in enumerate(islice(problems, PROBLEMS))
    ]
    files = {"mgsm_exemplars_en_zh.json": _pretty({"zh": shots}), "test.jsonl": _json_lines(rows)}
    return files | _description({"test": {"gsm8k_zh": PROBLEMS}})


def _exercises(task: str, make: Callable[[Random], reasoning.Exercise]) -> Iterator[Problem]:
    """Yield different English exercises whose worked answers end in ``So the answer is X.``."""
    seen: set[str] = set()
    for number in count():
        ask, worked, result = make(Random(f"{SALT}:{task}:{number}"))
        in_form = task not in OPTION_TASKS or "Options:" in ask
        if ask.isascii() and in_form and ask not in seen:
            seen.add(ask)
            yield ask, worked if "So the answer is " in worked else f"So the answer is {result}.", result


def bbh() -> Files:
    """Return the files of the BBH sample set: three exemplars and 20 items a task."""
    files: Files = {}
    for task, (about, make) in BBH.items():
        exercises = _exercises(task, make)
        shots = [
            f"Q: {ask}\nA: Let's think step by step.\n{worked}"
            for ask, worked, _ in islice(exercises, TASK_SHOTS)
        ]
        examples = [{"input": ask, "target": result} for ask, _, result in islice(exercises, ITEMS)]
        files[f"cot-prompts/{task}.txt"] = "\n\n".join([f"{NOTICE}\n-----\n{about}", *shots])
        files[f"bbh/{task}.json"] = _pretty({"examples": examples})
    return files | _description({"test": dict.fromkeys(BBH, ITEMS)})


def _pretty(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _json_lines(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _description(rows: Mapping[str, Mapping[str, int]]) -> Files:
    """Describe a set so that its rows are not taken for the official ones."""
    return {"sample_set.json": _pretty({"rows": rows})}


SETS: Mapping[str, Callable[[], Files]] = {
    "ceval_sample": ceval,
    "mmlu_sample": mmlu,
    "gsm8k_sample": gsm8k,
    "gsm8k_zh_sample": gsm8k_zh,
    "bbh_sample": bbh,
}


def write(folder: Path) -> None:
    """Write all sample sets, one folder each; READMEs stand beside them and are not touched."""
    for name, make in SETS.items():
        for path, text in make().items():
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
