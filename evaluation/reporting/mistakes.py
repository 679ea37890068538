"""The page of the answers worth reading: wrong, not understood, truncated."""

from __future__ import annotations

import html
from collections.abc import Sequence

from evaluation.reporting.judging import Judgement
from evaluation.reporting.page import Article, both, build_page, question_block
from evaluation.reporting.results import Result

MAX_SHOWN = 2000
"""More would make a page that browsers open slowly; the rest is in ``answers.jsonl``."""

WORDS = {
    "wrong": ("wrong", "答错"),
    "unparsed": ("not understood", "未能提取答案"),
    "truncated": ("truncated", "被截断"),
    "undecided": ("not compared in time, counted as wrong", "未能及时比较，按答错计"),
    "correct": ("right", "答对"),
    "graded": ("graded", "按得分计"),
    "score": ("grade", "得分"),
    "gold": ("gold answer", "标准答案"),
    "completion": ("completion", "模型输出"),
    "probabilities": ("log-probabilities", "对数概率"),
    "too_long": ("no context of the model holds this question", "题目超出模型上下文长度"),
    "none": ("nothing", "无"),
}
FILTERS = {mark: WORDS[mark] for mark in ("wrong", "unparsed", "truncated")}


def mistakes_page(result: Result) -> str:
    """Return the page; every text of data and model in it is escaped.

    Args:
        result: of a run.
    """
    bad = ("wrong", "unparsed", "graded") if result.task.labelled else ("unparsed",)
    chosen = [
        each
        for each in result.judgements
        if each.is_truncated or (each.status(result.rule) in bad and not each.is_correct.get(result.rule))
    ]
    shown = _spread(chosen)
    counts = _counts(result, len(chosen), len(shown))
    filters = FILTERS | ({"graded": WORDS["graded"]} if result.is_graded else {})
    if result.task.labelled and result.num_undecided:
        filters |= {"undecided": WORDS["undecided"]}
    return build_page(
        result.title, counts, filters, [_article(each, result) for each in shown], width="60rem"
    )


def _spread(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Return all, or as many as are shown, spread evenly over the data."""
    if len(judgements) <= MAX_SHOWN:
        return list(judgements)
    return [judgements[place * len(judgements) // MAX_SHOWN] for place in range(MAX_SHOWN)]


def _counts(result: Result, num_chosen: int, num_shown: int) -> list[str]:
    micro = result.summary.micro
    wrong = sum(each.status(result.rule) == "wrong" for each in result.judgements)
    counts = [("unparsed", micro.num_unparsed), ("truncated", micro.num_truncated)]
    if result.task.labelled:
        counts.insert(0, ("wrong", wrong))
        if result.num_undecided:
            counts.append(("undecided", result.num_undecided))
    parts = [f"{both(WORDS[name])}: {count}" for name, count in counts]
    if num_shown < num_chosen:
        english = f"shown: {num_shown} of {num_chosen}, evenly spread; all: answers.jsonl"
        chinese = f"显示 {num_shown} / {num_chosen} 题（均匀抽取）；全部见 answers.jsonl"
        parts.append(both((english, chinese)))
    return parts


def _article(judgement: Judgement, result: Result) -> Article:
    sample, answer = judgement.sample, judgement.answer
    marks = [judgement.status(result.rule), *(["truncated"] if judgement.is_truncated else [])]
    if result.task.labelled and result.rule in judgement.undecided:
        marks.append("undecided")
    body = [
        question_block(sample),
        "<table>",
        *([_row(both(WORDS["gold"]), html.escape(sample.answer))] if result.task.labelled else []),
        *(_row(html.escape(rule), _extracted(judgement, rule)) for rule in judgement.extracted),
    ]
    if result.is_graded and result.task.labelled:
        body.append(_row(both(WORDS["score"]), f"{judgement.scores.get(result.rule, 0.0):.3f}"))
    if answer.choice_logprobs is not None:
        named = zip(result.task.choices, answer.choice_logprobs, strict=False)
        text = ", ".join(f"{choice.strip()} {value:.2f}" for choice, value in named)
        body.append(_row(both(WORDS["probabilities"]), html.escape(text)))
    body.append("</table>")
    if judgement.is_too_long:
        body.append(f"<p>{both(WORDS['too_long'])}</p>")
    if answer.completion is not None:
        body.append(f"<p>{both(WORDS['completion'])}</p><pre>{html.escape(answer.completion)}</pre>")
    return Article(sample.subject, sample.index, {mark: WORDS[mark] for mark in marks}, body)


def _extracted(judgement: Judgement, rule: str) -> str:
    value = judgement.extracted[rule]
    if value is None:
        return f'<span class="unparsed">{both(WORDS["none"])}</span>'
    return f'<span class="{"right" if judgement.is_correct[rule] else "wrong"}">{html.escape(value)}</span>'


def _row(name: str, value: str) -> str:
    return f"<tr><th>{name}</th><td>{value}</td></tr>"
