"""Groups of prompts that begin alike."""

from __future__ import annotations

import random

from glmtune.inference.engine.prompt_groups import PromptGroup, common_length, group_prompts


def test_common_length():
    assert common_length((), (1,)) == 0
    assert common_length((1, 2, 3), (1, 2, 3)) == 3
    assert common_length((1, 2, 3, 4), (1, 2, 9, 4)) == 2
    assert common_length((5, 2), (1, 2)) == 0


def test_one_group_of_one_shared_prompt_longest_first():
    prompts = [(1, 2, 3, 9), (1, 2, 3, 8, 8), (1, 2, 3, 7)]
    assert group_prompts(prompts, min_gain=1) == [PromptGroup(3, (1, 0, 2))]


def test_subjects_are_told_apart_although_all_prompts_begin_alike():
    prompts = [(1, 2, *[subject] * 20, place) for subject in (5, 6) for place in range(4)]
    assert sorted(group_prompts(prompts, min_gain=30), key=lambda group: group.members) == [
        PromptGroup(22, (0, 1, 2, 3)),
        PromptGroup(22, (4, 5, 6, 7)),
    ]


def test_a_gain_too_small_is_not_taken():
    prompts = [(1, 2, 3, 4), (1, 2, 5, 6)]
    assert group_prompts(prompts, min_gain=3) == [PromptGroup(0, (0, 1))]
    assert group_prompts(prompts, min_gain=2) == [PromptGroup(2, (0, 1))]


def test_twins_leave_a_token_to_read():
    assert group_prompts([(1, 2, 3)] * 3, min_gain=1) == [PromptGroup(2, (0, 1, 2))]


def test_nothing_and_one_prompt():
    assert group_prompts([], min_gain=1) == []
    assert group_prompts([(1, 2)], min_gain=1) == [PromptGroup(0, (0,))]


def test_every_prompt_is_in_one_group_that_shares_what_it_says():
    draw = random.Random(0)
    for _ in range(200):
        prompts = [
            tuple(draw.choice((1, 2)) for _ in range(draw.randint(1, 8))) for _ in range(draw.randint(1, 30))
        ]
        groups = group_prompts(prompts, min_gain=draw.randint(1, 6))
        assert sorted(place for group in groups for place in group.members) == list(range(len(prompts)))
        for group in groups:
            first = prompts[group.members[0]][: group.num_shared]
            assert all(prompts[place][: group.num_shared] == first for place in group.members)
            assert all(len(prompts[place]) > group.num_shared for place in group.members)
