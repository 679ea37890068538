"""Generation settings that contradict themselves are refused with key and value."""

from __future__ import annotations

import pytest

from glmtune.errors import ConfigError
from glmtune.inference.settings import GenerationSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0.7}, r"`generation.top_p` 0.7 cannot be obeyed.*do_sample=true"),
        ({"temperature": 0.5, "top_k": 3}, r"temperature` 0.5, `generation.top_k` 3 cannot be obeyed"),
        ({"do_sample": True, "num_beams": 2}, r"num_beams` is 2, but beams and .*exclude"),
        ({"do_sample": True, "temperature": 0.0}, r"temperature` is 0.0, but it must be above 0"),
        ({"do_sample": True, "temperature": 101.0}, r"temperature` is 101.0, but it must be .* at most 100"),
        ({"do_sample": True, "top_p": 1.2}, r"top_p` is 1.2, but it must be above 0 and at most 1"),
        ({"do_sample": True, "top_k": -1}, r"top_k` is -1, but it must be at least 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty` is 0.0, but it must be from 0.01"),
        ({"repetition_penalty": 11.0}, r"repetition_penalty` is 11.0, but it must be .* to 10"),
        ({"max_new_tokens": 0}, r"max_new_tokens` is 0, but it must be at least 1"),
        ({"num_beams": 0}, r"num_beams` is 0, but it must be at least 1"),
        ({"batch_size": 0}, r"batch_size` is 0, but it must be at least 1"),
        ({"max_batch_tokens": -5}, r"max_batch_tokens` is -5, but it must be at least 1"),
        ({"seed": -1}, r"seed` is -1, but it must be at least 0"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**values)


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError, match=r"(?s)num_beams` is 0.*seed` is -1"):
        GenerationSettings(num_beams=0, seed=-1)


def test_sampling_defaults_are_the_official_ones():
    assert GenerationSettings(do_sample=True).sampling == (0.95, 50, 0.7)
    assert GenerationSettings(do_sample=True, top_p=0.9, top_k=0).sampling == (0.95, 0, 0.9)
