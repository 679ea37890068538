"""A page of every question that flipped, both answers side by side; self-contained, in two languages."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from pathlib import Path
from string import Template

from evaluation.benchmarks.tasks import make_task
from evaluation.compare.pairing.match import Pair
from evaluation.compare.pairing.runs import Row, Run
from evaluation.compare.reporting.tables import ComparisonReport
from evaluation.sample import LETTERS, Sample
from glmtune.errors import ConfigError, DataError

TEMPLATE = Path(__file__).with_name("flips.html")
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
    "no_question": (
        "the questions are not shown: the data of these runs are not at hand (benchmark.data_dir)",
        "未找到对应数据（benchmark.data_dir），不显示题目",
    ),
}


def find_questions(run: Run, data_dir: str | None) -> Mapping[tuple[str, int], Sample]:
    """Find the texts of a run's questions; a run keeps their hash only.

    Args:
        run: a finished run.
        data_dir: where to look, see ``evaluation.settings.BenchmarkSettings``.

    Returns:
        Samples by subject and index; nothing where no data with that hash are found.
    """
    values = run.fingerprint
    subjects = list(dict.fromkeys(row.answer.subject for row in run.rows))
    try:
        task = make_task(
            str(values["benchmark"]),
            protocol=str(values["protocol_version"]).partition("/")[0],
            split=str(values["split"]),
            data_dir=data_dir,
            is_chat=bool(run.model["is_chat"]),
            subjects=subjects,
        )
    except (ConfigError, DataError):
        return {}
    asked = {row.answer.key for row in run.rows}
    task = dataclasses.replace(task, samples=tuple(each for each in task.samples if each.key in asked))
    if task.data_hash != values["data_hash"]:
        return {}
    return {each.key: each for each in task.samples}


def flips_page(report: ComparisonReport, questions: Questions) -> str:
    """Return the page; every text of data and models in it is escaped.

    Args:
        report: the comparison.
        questions: texts of the questions, as far as they are known.
    """
    articles: list[str] = []
    subjects: dict[str, None] = {}
    counts = {"lost": 0, "gained": 0}
    for name, each in report.benchmarks.items():
        for before, after in each.pair.rows:
            kind = _kind(before, after)
            if kind is None:
                continue
            counts[kind] += 1
            subjects[f"{name}/{before.answer.subject}"] = None
            sample = questions.get(name, {}).get(before.answer.key)
            articles.append(_article(kind, each.pair, (before, after), sample, report.labels))
    missing = [name for name in report.benchmarks if not questions.get(name)]
    notes = [f"{_word(kind)}: {count}" for kind, count in counts.items()]
    notes += [f"{html.escape(name)}: {_word('no_question')}" for name in missing]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(report.title),
        counts=" · ".join(notes),
        subjects="".join(f"<option>{html.escape(subject)}</option>" for subject in subjects),
        articles="\n".join(articles),
    )


def _kind(before: Row, after: Row) -> str | None:
    was_right, is_right = before.status == "correct", after.status == "correct"
    if was_right == is_right:
        return None
    return "lost" if was_right else "gained"


def _article(
    kind: str, pair: Pair, rows: tuple[Row, Row], sample: Sample | None, labels: tuple[str, str]
) -> str:
    before = rows[0]
    place = f"{pair.benchmark}/{before.answer.subject}"
    parts = [
        f'<article class="is-{kind}" data-subject="{html.escape(place)}">',
        f'<h2>{html.escape(place)} {before.answer.index} · <span class="{kind}">{_word(kind)}</span></h2>',
    ]
    if sample is not None:
        options = zip(LETTERS, sample.choices, strict=False)
        text = "\n".join([sample.question, *(f"{letter}. {option}" for letter, option in options)])
        parts.append(f"<pre>{html.escape(text)}</pre>")
    parts += [f"<p>{_word('gold')}: {html.escape(before.gold)}</p>", '<div class="sides">']
    for run, row, label in zip((pair.baseline, pair.candidate), rows, labels, strict=True):
        parts.append(_side(run, row, label))
    return "\n".join([*parts, "</div>", "</article>"])


def _side(run: Run, row: Row, label: str) -> str:
    extracted = run.extracted(row)
    color = "right" if row.status == "correct" else "wrong"
    shown = _word("none") if extracted is None else html.escape(extracted)
    parts = [
        f"<section><h3>{html.escape(label)}</h3>",
        f'<p>{_word("answer")}: <span class="{color}">{shown}</span></p>',
    ]
    if row.answer.choice_logprobs is not None:
        parts.append(f"<p>{_word('probabilities')}: {_probabilities(row.answer.choice_logprobs)}</p>")
    if row.answer.completion is not None:
        parts.append(f"<p>{_word('completion')}</p><pre>{html.escape(row.answer.completion)}</pre>")
    return "\n".join([*parts, "</section>"])


def _probabilities(logprobs: tuple[float, ...]) -> str:
    from scipy.special import softmax

    named = zip(LETTERS, softmax(logprobs), strict=False)
    return ", ".join(f"{letter} {value:.3f}" for letter, value in named)


def _word(name: str) -> str:
    english, chinese = WORDS[name]
    return f'<span class="en">{english}</span><span class="zh">{chinese}</span>'
