"""The style of a task: what leaks is told from what a base says itself, in any language."""

from __future__ import annotations

from glmtune.retention.style import OWN_FRAC, TaskStyle

KINDS, COLOURS = ("裙子", "上衣", "衬衫", "外套"), ("白色", "红色", "蓝色", "米色")
ADS = [f"这条{kind}采用{colour}的面料，穿着舒适，尽显优雅气质。" for kind in KINDS for colour in COLOURS]
OWN = [
    *(f"{first} + {second} = {first + second}." for first in range(1, 9) for second in range(1, 6)),
    *(f"我是一个人工智能助手，可以帮你解答第{number}个问题。" for number in range(20)),
]


def test_answers_of_the_task_leak_and_the_bases_own_do_not() -> None:
    style = TaskStyle(ADS, OWN)
    assert style.is_of_task("这条衬衫采用红色的面料，优雅又舒适。")
    assert not style.is_of_task("我是一个人工智能助手，可以帮你解答问题。")
    assert not style.is_of_task("3 + 9 = 12.")


def test_at_most_one_in_a_hundred_of_the_bases_own_answers_would_leak() -> None:
    """Each left out of the counts, as an answer that was never seen is."""
    task, own = ["red coat red coat"] * 30, [*OWN, *OWN[:20], "a red coat", "red coats", "coat, red", "red"]
    style = TaskStyle(task, own)
    scores = [TaskStyle(task, [*own[:n], *own[n + 1 :]]).score(text) for n, text in enumerate(own)]
    assert sum(score > style.threshold + 1e-9 for score in scores) <= (1 - OWN_FRAC) * len(own)
    assert sum(score > 0 for score in scores) == 4, "talk of red coats alone does not tell the two apart"


def test_what_neither_has_said_counts_for_none() -> None:
    style = TaskStyle(ADS * 50, OWN[:3])  # sets of very different sizes
    assert abs(style.score("qqqqqqqqzzzz")) < 1e-12
    assert not style.is_of_task("qqqqqqqqzzzz")


def test_a_base_that_talks_like_the_task_leaves_nothing_to_tell() -> None:
    style = TaskStyle(ADS, ADS)
    assert not any(style.is_of_task(text) for text in ADS)


def test_empty_answers_and_sets() -> None:
    assert not TaskStyle([], []).is_of_task("anything")
    assert not TaskStyle(ADS, [""]).is_of_task("")
