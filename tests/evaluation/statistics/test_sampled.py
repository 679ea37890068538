"""Estimates from several answers: against all subsets, against simulation, and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from evaluation.metrics import Groups, Outcome, graded_stderr, summarize_outcomes
from evaluation.statistics.sampled import Draws, drawing_variance, pass_at_k, steps_of_k


def draws(answers: str, right: str) -> Draws:
    """One letter an answer, `-` for nothing understood."""
    read = tuple(None if letter == "-" else letter for letter in answers)
    return Draws(read, tuple(float(letter == right) for letter in read))


@pytest.mark.parametrize("num_answers", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(num_answers: int) -> None:
    for num_right in range(num_answers + 1):
        right = [place < num_right for place in range(num_answers)]
        for k in range(1, num_answers + 1):
            subsets = list(itertools.combinations(right, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(num_answers, num_right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_that_of_the_paper_for_many_answers() -> None:
    """The product form of the paper's numpy code, which needs no binomial coefficient."""
    n, c, k = 200, 13, 100
    assert pass_at_k(n, c, k) == pytest.approx(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)), rel=1e-12)


def test_pass_at_k_has_no_bias_and_the_plain_estimate_has() -> None:
    chance, k, generator = 0.2, 5, np.random.default_rng(0)
    counts = generator.binomial(10, chance, 20_000)
    unbiased = np.mean([pass_at_k(10, int(count), k) for count in counts])
    plain = np.mean(1 - (1 - counts / 10) ** k)
    truth = 1 - (1 - chance) ** k
    assert unbiased == pytest.approx(truth, abs=0.006)
    assert truth - plain > 0.03


@pytest.mark.parametrize(
    ("answers", "right", "mean", "majority", "voted"),
    [
        ("778", "7", 2 / 3, 1.0, "7"),
        ("345", "3", 1 / 3, 1 / 3, "3"),
        ("-99", "1", 0.0, 0.0, "9"),
        ("--2", "2", 1 / 3, 1.0, "2"),
        ("---", "2", 0.0, 0.0, None),
        ("1122", "2", 0.5, 0.5, "1"),
    ],
    ids=["most", "tie_of_three", "wrong_vote", "silence_does_not_vote", "nobody", "tie_of_two"],
)
def test_mean_and_vote(answers: str, right: str, mean: float, majority: float, voted: str | None) -> None:
    found = draws(answers, right)
    assert (found.mean, found.majority, found.voted) == (pytest.approx(mean), pytest.approx(majority), voted)


def test_a_tie_is_what_lots_give_on_average() -> None:
    generator, found = np.random.default_rng(1), draws("aabbc", "b")
    drawn = [generator.choice(["a", "b"]) == "b" for _ in range(4000)]
    assert found.majority == pytest.approx(np.mean(drawn), abs=0.03)


def test_grades_are_averaged_and_full_marks_pass() -> None:
    found = Draws(("x", "y", "y"), (0.5, 1.0, 1.0))
    assert found.mean == pytest.approx(2.5 / 3)
    assert found.majority == 1.0
    assert found.pass_at(2) == 1.0
    assert found.num_right == 2


def test_steps_are_powers_of_two_and_all() -> None:
    assert [steps_of_k(n) for n in (1, 2, 3, 8, 12)] == [(), (2,), (2, 3), (2, 4, 8), (2, 4, 8, 12)]


def test_the_question_is_the_unit() -> None:
    """Eight answers to each of 30 questions: the error is that of 30 scores, not that of 240 answers."""
    generator = np.random.default_rng(2)
    chances = generator.beta(0.5, 0.5, 30)
    counts = generator.binomial(8, chances)
    outcomes = [Outcome("law", place, False, score=float(count) / 8) for place, count in enumerate(counts)]
    score = summarize_outcomes(outcomes, Groups()).micro
    assert score.accuracy == pytest.approx(counts.mean() / 8)
    assert score.stderr == pytest.approx((counts / 8).std(ddof=1) / np.sqrt(30))
    assert score.stderr > 2 * np.sqrt(score.accuracy * (1 - score.accuracy) / 240)
    assert graded_stderr([0.5], [1.0]) is None


def test_the_part_of_the_drawing_is_what_redrawing_shows() -> None:
    generator = np.random.default_rng(3)
    chances = generator.beta(1, 1, 200)
    parts, means = [], []
    for _ in range(400):
        drawn = generator.random((200, 4)) < chances[:, None]
        rows = [Draws(tuple("r" if each else "w" for each in row), tuple(map(float, row))) for row in drawn]
        parts.append(drawing_variance(rows))
        means.append(drawn.mean())
    assert np.mean(parts) == pytest.approx(np.var(means, ddof=1), rel=0.2)
    assert drawing_variance([Draws(("r",), (1.0,))]) is None
