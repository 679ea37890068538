"""A page of the answers worth reading: wrong, not understood, truncated; self-contained, in two languages."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

from evaluation.reporting.judging import Verdict
from evaluation.reporting.results import Result
from evaluation.sample import LETTERS

TEMPLATE = Path(__file__).with_name("mistakes.html")
MAX_SHOWN = 2000
"""More would make a page that browsers open slowly; the rest is in ``answers.jsonl``."""

WORDS = {
    "wrong": ("wrong", "答错"),
    "unparsed": ("not understood", "未能提取答案"),
    "truncated": ("truncated", "被截断"),
    "correct": ("right", "答对"),
    "gold": ("gold answer", "标准答案"),
    "completion": ("completion", "模型输出"),
    "probabilities": ("log-probabilities", "对数概率"),
    "too_long": ("no context of the model holds this question", "题目超出模型上下文长度"),
    "none": ("nothing", "无"),
}


def mistakes_page(result: Result) -> str:
    """Return the page; every text of data and model in it is escaped.

    Args:
        result: of a run.
    """
    rule = result.rule
    chosen = [
        verdict
        for verdict in result.verdicts
        if verdict.is_truncated or verdict.status(rule) in _bad_states(result)
    ]
    shown = _spread(chosen)
    subjects = dict.fromkeys(verdict.sample.subject for verdict in shown)
    options = "".join(f"<option>{html.escape(subject)}</option>" for subject in subjects)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(result.title),
        counts=_counts(result, len(chosen), len(shown)),
        subjects=options,
        articles="\n".join(_article(verdict, result) for verdict in shown),
    )


def _bad_states(result: Result) -> tuple[str, ...]:
    return ("wrong", "unparsed") if result.task.labelled else ("unparsed",)


def _spread(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return all, or as many as are shown, spread evenly over the data."""
    if len(verdicts) <= MAX_SHOWN:
        return list(verdicts)
    return [verdicts[place * len(verdicts) // MAX_SHOWN] for place in range(MAX_SHOWN)]


def _counts(result: Result, num_chosen: int, num_shown: int) -> str:
    micro = result.summary.micro
    wrong = sum(verdict.status(result.rule) == "wrong" for verdict in result.verdicts)
    counts = [("unparsed", micro.num_unparsed), ("truncated", micro.num_truncated)]
    if result.task.labelled:
        counts.insert(0, ("wrong", wrong))
    parts = [f"{_word(name)}: {count}" for name, count in counts]
    if num_shown < num_chosen:
        parts.append(
            f'<span class="en">shown: {num_shown} of {num_chosen}, evenly spread; all: answers.jsonl</span>'
            f'<span class="zh">显示 {num_shown} / {num_chosen} 题（均匀抽取）；全部见 answers.jsonl</span>'
        )
    return " · ".join(parts)


def _article(verdict: Verdict, result: Result) -> str:
    sample, answer = verdict.sample, verdict.answer
    status = verdict.status(result.rule)
    marks = [status, *(["truncated"] if verdict.is_truncated else [])]
    heading = " · ".join(f'<span class="{_class(mark)}">{_word(mark)}</span>' for mark in marks)
    classes = " ".join(f"is-{mark}" for mark in marks)
    question = "\n".join(
        [
            sample.question,
            *(f"{letter}. {text}" for letter, text in zip(LETTERS, sample.choices, strict=False)),
        ]
    )
    subject = html.escape(sample.subject)
    parts = [
        f'<article class="{classes}" data-subject="{subject}">',
        f"<h2>{subject} {sample.index} · {heading}</h2>",
        f"<pre>{html.escape(question)}</pre>",
        "<table>",
        *([_row(_word("gold"), html.escape(sample.answer))] if result.task.labelled else []),
        *(_row(html.escape(rule), _extracted(verdict, rule)) for rule in verdict.extracted),
    ]
    if answer.choice_logprobs is not None:
        named = zip(result.task.choices, answer.choice_logprobs, strict=False)
        text = ", ".join(f"{choice.strip()} {value:.2f}" for choice, value in named)
        parts.append(_row(_word("probabilities"), html.escape(text)))
    parts.append("</table>")
    if verdict.is_too_long:
        parts.append(f"<p>{_word('too_long')}</p>")
    if answer.completion is not None:
        parts.append(f"<p>{_word('completion')}</p><pre>{html.escape(answer.completion)}</pre>")
    return "\n".join([*parts, "</article>"])


def _extracted(verdict: Verdict, rule: str) -> str:
    value = verdict.extracted[rule]
    if value is None:
        return f'<span class="unparsed">{_word("none")}</span>'
    return f'<span class="{"right" if verdict.is_correct[rule] else "wrong"}">{html.escape(value)}</span>'


def _class(mark: str) -> str:
    return "right" if mark == "correct" else mark


def _row(name: str, value: str) -> str:
    return f"<tr><th>{name}</th><td>{value}</td></tr>"


def _word(name: str) -> str:
    english, chinese = WORDS[name]
    return f'<span class="en">{english}</span><span class="zh">{chinese}</span>'
