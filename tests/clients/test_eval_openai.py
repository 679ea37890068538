"""`glmtune eval backend=openai` against `glmtune serve` says what `glmtune eval` says, question by question."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.backends.openai_replies import UNLISTED_LOGPROB
from tests.clients.answers import IN_PROCESS, answers

SAME = ("prompt_hash", "completion", "extracted", "stop_reason", "num_prompt_tokens", "num_new_tokens")
WAYS = {
    "reasoning in chat, then a letter": ("ceval", ("is_chat=true", "protocol=zero_shot_cot")),
    "letters after text": ("mmlu", ("is_chat=false", "protocol=few_shot_direct")),
}


@pytest.mark.parametrize(
    ("way", "limit"),
    [*((way, 2) for way in WAYS), *(pytest.param(way, 100, marks=pytest.mark.slow) for way in WAYS)],
)
def test_answers_are_those_of_the_engine(way: str, limit: int, served_float32: str, tmp_path: Path) -> None:
    benchmark, words = WAYS[way]
    asked = [*words, f"benchmark.limit={limit}"]
    here = answers(tmp_path / "here", benchmark, *asked, *IN_PROCESS)
    # Without `endpoint.max_context_tokens`: the server says how long its context is.
    endpoint = ["backend=openai", f"endpoint.base_url={served_float32}/v1"]
    there = answers(tmp_path / "there", benchmark, *asked, *endpoint)
    assert len(here) >= 4 * min(limit, 10)
    # OpenAI's interface lists 20 next tokens: a question after which no letter is among them fails, and is
    # said to.
    failed = "".join(path.read_text("utf-8") for path in (tmp_path / "there").glob("failed-rank*.jsonl"))
    unlisted = here.keys() - there.keys()
    assert len(unlisted) == failed.count("likeliest next tokens that the server lists") <= 1
    for key, found in there.items():
        answer = here[key]
        assert {name: found[name] for name in SAME} == {name: answer[name] for name in SAME}, key
        for value, expected in zip(found["choice_logprobs"], answer["choice_logprobs"], strict=True):
            assert value == pytest.approx(expected, abs=1e-4) or value == UNLISTED_LOGPROB, key
