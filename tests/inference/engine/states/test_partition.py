"""Which rows lie in one bank: always the least cost."""

from __future__ import annotations

import itertools
import random

from glmtune.inference.engine.states.partition import bank_cost, partition


def cost_of(groups, columns, cost):
    return sum(cost + len(group) * max(columns[place] for place in group) for group in groups)


def least_cost(columns, cost):
    """Try every division of the sorted rows."""
    order = sorted(range(len(columns)), key=lambda place: -columns[place])
    divisions = itertools.product((False, True), repeat=len(order) - 1)
    found = []
    for cuts in divisions:
        groups = [[order[0]]]
        for place, cut in zip(order[1:], cuts, strict=True):
            if cut:
                groups.append([])
            groups[-1].append(place)
        found.append(cost_of(groups, columns, cost))
    return min(found)


def test_the_cost_is_the_least():
    draw = random.Random(0)
    for _ in range(60):
        # Of clearly unlike lengths: those within a sixteenth are not told apart.
        columns = [draw.choice((2, 10, 30, 40, 100, 300, 900)) for _ in range(draw.randint(1, 8))]
        cost = draw.choice((1, 20, 100, 1000, 10**6))
        groups = partition(columns, cost)
        assert sorted(itertools.chain(*groups)) == list(range(len(columns)))
        assert cost_of(groups, columns, cost) == least_cost(columns, cost)


def test_the_longest_come_first_in_and_among_banks():
    columns = [5, 900, 7, 880, 6, 300]
    groups = partition(columns, 10)
    flat = [columns[place] for group in groups for place in group]
    assert flat == sorted(columns, reverse=True)
    assert [columns[group[0]] for group in groups] == [900, 300, 7]


def test_nothing_and_one():
    assert partition([], 10) == []
    assert partition([3], 10) == [[0]]


def test_many_rows_of_about_one_length_lie_together():
    groups = partition(list(range(1000, 1060)), 1)
    assert len(groups) == 1


def test_a_bank_costs_more_where_kernels_start_slowly():
    assert bank_cost(512, "cuda") > bank_cost(512, "cpu") > bank_cost(1024, "cpu") > 0
