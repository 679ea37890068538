"""The page of every question that flipped, both answers side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping

from evaluation.compare.pairing.match import Pair
from evaluation.compare.pairing.runs import JudgedAnswer, Run
from evaluation.compare.reporting.tables import ComparisonReport
from evaluation.reporting.page import Article, both, build_page, question_block
from evaluation.sample import ALPHABET, Sample

Questions = Mapping[str, Mapping[tuple[str, int], Sample]]
"""Benchmark to the samples by subject and index; empty where the data are not at hand."""

WORDS = {
    "lost": ("lost", "答对变答错"),
    "gained": ("gained", "答错变答对"),
    "gold": ("gold answer", "标准答案"),
    "answer": ("answer read", "提取的答案"),
    "probabilities": ("probabilities", "选项概率"),
    "completion": ("completion", "模型输出"),
    "none": ("nothing", "无"),
    "grade": ("grade", "得分"),
    "no_question": (
        "the questions are not shown: the data of these runs are not at hand (benchmark.data_dir)",
        "未找到对应数据（benchmark.data_dir），不显示题目",
    ),
}
FILTERS = {"lost": ("lost: right before", "答对变答错"), "gained": ("gained: right after", "答错变答对")}


def flips_page(report: ComparisonReport, questions: Questions) -> str:
    """Return the page; every text of data and models in it is escaped.

    Args:
        report: the comparison.
        questions: texts of the questions, as far as they are known.
    """
    articles: list[Article] = []
    counts = {"lost": 0, "gained": 0}
    for name, each in report.benchmarks.items():
        for before, after in each.pair.rows:
            flip = _flip(before, after)
            if flip is None:
                continue
            counts[flip] += 1
            sample = questions.get(name, {}).get(before.answer.key)
            articles.append(_article(flip, each.pair, (before, after), sample, report.labels))
    missing = [name for name in report.benchmarks if not questions.get(name)]
    notes = [f"{both(WORDS[flip])}: {count}" for flip, count in counts.items()]
    notes += [f"{html.escape(name)}: {both(WORDS['no_question'])}" for name in missing]
    return build_page(report.title, notes, FILTERS, articles, width="76rem")  # two answers side by side


def _flip(before: JudgedAnswer, after: JudgedAnswer) -> str | None:
    if before.value == after.value:  # 1 or 0, or grades, of which one may be lower than the other
        return None
    return "lost" if before.value > after.value else "gained"


def _article(
    flip: str,
    pair: Pair,
    rows: tuple[JudgedAnswer, JudgedAnswer],
    sample: Sample | None,
    labels: tuple[str, str],
) -> Article:
    before = rows[0]
    gold = f"<p>{both(WORDS['gold'])}: {html.escape(before.gold)}</p>"
    sides = zip((pair.baseline, pair.candidate), rows, labels, strict=True)
    return Article(
        f"{pair.benchmark}/{before.answer.subject}",
        before.answer.index,
        {flip: WORDS[flip]},
        [
            *([] if sample is None else [question_block(sample)]),
            gold,
            '<div class="sides">',
            *(_side(run, row, label) for run, row, label in sides),
            "</div>",
        ],
    )


def _side(run: Run, row: JudgedAnswer, label: str) -> str:
    extracted = run.extracted(row)
    color = "right" if row.status == "correct" else "wrong"
    shown = both(WORDS["none"]) if extracted is None else html.escape(extracted)
    grade = "" if row.score is None else f" · {both(WORDS['grade'])} {row.score:.3f}"
    parts = [
        f"<section><h3>{html.escape(label)}</h3>",
        f'<p>{both(WORDS["answer"])}: <span class="{color}">{shown}</span>{grade}</p>',
    ]
    if row.answer.choice_logprobs is not None:
        parts.append(f"<p>{both(WORDS['probabilities'])}: {_probabilities(row.answer.choice_logprobs)}</p>")
    if row.answer.completion is not None:
        parts.append(f"<p>{both(WORDS['completion'])}</p><pre>{html.escape(row.answer.completion)}</pre>")
    return "\n".join([*parts, "</section>"])


def _probabilities(logprobs: tuple[float, ...]) -> str:
    from scipy.special import softmax

    named = zip(ALPHABET, softmax(logprobs), strict=False)
    return ", ".join(f"{letter} {value:.3f}" for letter, value in named)
