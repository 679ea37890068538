"""Thinking is kept, said, and read by no rule."""

from __future__ import annotations

import pytest

from evaluation.answer import Answer
from evaluation.benchmarks.tasks import make_task
from evaluation.extraction.text import thinks, without_thinking
from evaluation.reporting.results import make_result, results_json
from evaluation.reporting.tables import average_table
from evaluation.running.fingerprint import fingerprint
from evaluation.task import TEXT
from tests.evaluation.doubles import IDENTITY
from tests.evaluation.doubles import make_task as made_up_task


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>Is it A?</think>B", "B"),
        ("<think>\nThe answer is A, or C\n", ""),
        ("The answer is A? No.</think>\n\nB", "\n\nB"),
        ("</think>B", "B"),
        ("B<think>Or A", "B"),
        ("<think>a</think>B<think>c</think>", "B"),
        ("<think>I write </think> myself: A</think>B", "B"),
        ("<think>a<think>b</think>c</think>B", "B"),
        ("<THINKING>A</THINKING>B", "B"),
        ("No thought of <b>that</b>", "No thought of <b>that</b>"),
    ],
)
def test_what_is_said_stands_outside(text: str, said: str) -> None:
    assert without_thinking(text) == said
    assert thinks(text) == (said != text)


@pytest.mark.parametrize("benchmark", ["ceval", "mmlu", "gsm8k", "bbh"])
@pytest.mark.parametrize(
    "text", ["<think>So the answer is {}.", "<think>{}</think>", "所以答案是{}。</think>", "#### {}</think>"]
)
def test_no_rule_of_any_benchmark_reads_thinking(benchmark: str, text: str) -> None:
    task = make_task(benchmark, data_dir="sample")
    sample = task.samples[0]
    found = task.answers(sample, text=text.format(sample.answer))
    texts = {name for name, rule in task.rules.items() if rule.reads == TEXT}
    assert texts
    assert {found[name] for name in texts} == {None}


def test_the_second_stage_is_not_shown_it() -> None:
    task = make_task("ceval", data_dir="sample")
    sample = task.samples[0]
    shown = task.extraction_prompt(sample, "<think>Not this.</think>But this.")
    assert shown == task.extraction_prompt(sample, "But this.")


def test_it_is_kept_counted_and_said() -> None:
    task = made_up_task()
    texts = ["<think>B</think>A", "<think>A", *["A"] * (len(task.samples) - 2)]
    answers = [Answer(*sample.key, completion=text) for sample, text in zip(task.samples, texts, strict=True)]
    result = make_result(task, answers, fingerprint(task, IDENTITY, 512))
    assert result.judgements[0].answer.completion == "<think>B</think>A"
    values = results_json(result)
    assert (values["num_thinking"], values["num_thinking_unended"], values["num_unparsed"]) == (2, 1, 1)
    caption = average_table(result, None).caption
    assert "2 answers hold thinking" in caption
    assert "1 of them hold nothing else (`benchmark.max_new_tokens` is 16)" in caption
