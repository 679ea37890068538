"""Drafts are as long as they pay, by how often they were right lately."""

from __future__ import annotations

import pytest

from glmtune.inference.engine.batching.acceptance import BY_MODEL, EXPECTED, AcceptanceRates, best_width
from glmtune.inference.engine.sampling.lookup import SIZES


def width(*drafts: tuple[int, float], rows: int = 1, cost: float = 0.15, most: int = 64) -> int:
    return best_width(drafts, num_rows=rows, token_cost=cost, max_tokens=most)


def test_every_length_of_a_run_has_an_expectation():
    assert set(EXPECTED) == {*SIZES, BY_MODEL}


def test_a_draft_is_as_long_as_it_pays():
    assert width() == 1
    assert width((7, 0.1)) == 1  # by hand: (1 + 0.1) / 1.15 < 1
    assert width((7, 0.3)) == 2  # 1.3 / 1.15 = 1.13, 1.39 / 1.3 = 1.07
    assert width((7, 0.99)) == 8
    assert width((3, 0.99)) == 4
    assert width((7, 0.3), cost=0.0) == 8


def test_all_rows_pay_for_the_draft_of_one():
    assert width((7, 0.9), rows=4) == 1
    # By hand: width 4 has 4 x 3.439 / (1 + 0.15 x 15) = 4.23, 5 has 4 x 4.095 / 3.85 = 4.25, 6 has 4.21.
    assert width(*[(7, 0.9)] * 4, rows=4) == 5
    assert width(*[(7, 0.99)] * 4, rows=4, most=15) == 3


def test_what_was_right_lately_counts():
    rates = AcceptanceRates()
    assert rates.rate(2) == pytest.approx(EXPECTED[2])
    for _ in range(10):
        rates.note(2, num_drafted=4, num_accepted=4)
    assert rates.rate(2) > 0.9
    assert rates.rate(3) == pytest.approx(EXPECTED[3])  # apart
    for _ in range(10):
        rates.note(2, num_drafted=4, num_accepted=0)
    assert 0.2 < rates.rate(2) < 0.5
    for _ in range(20):
        rates.note(2, num_drafted=4, num_accepted=0)
    assert rates.rate(2) < 0.15


def test_a_request_whose_drafts_were_wrong_tries_again_later():
    rates = AcceptanceRates()
    for _ in range(30):
        rates.note(3, num_drafted=1, num_accepted=0)
    assert width((7, rates.rate(3))) == 1
    steps = 0
    while width((7, rates.rate(3))) == 1:
        rates.skip(3)
        steps += 1
        assert steps < 100
    assert steps > 10
