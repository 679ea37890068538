"""SERVER_CASES, B: lengths."""

from __future__ import annotations

import re

import pytest

from glmtune.serving.api.state import RouteLimits
from tests.serving.api.conftest import Scripts
from tests.serving.api.replies import assert_refused, chat_of, completion_of
from tests.serving.api.running_server import RunningServer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_case_14_prompt_and_answer_beyond_the_context(name: str, stream: bool, scripts: Scripts) -> None:
    server = scripts.start("早点休息", context=64)
    message = assert_refused(
        server.chat(**{name: 60}, stream=stream), param=name, code="context_length_exceeded"
    )
    num_prompt = len(server.state.chat.prompt_ids([{"role": "user", "content": "你好"}]))
    assert re.findall(r"\d+", message) == [str(num_prompt), "60", "64", str(64 - num_prompt)]
    assert server.state.chat.engine.requests == []
    assert chat_of(server.chat(**{name: 64 - num_prompt})).choices[0].finish_reason == "stop"


def test_case_15_prompt_alone_beyond_the_context(live: RunningServer) -> None:
    message = assert_refused(live.chat("好" * 3000), param="messages", code="context_length_exceeded")
    assert "1024" in message
    assert_refused(live.completion("好" * 3000), param="prompt", code="context_length_exceeded")
    assert chat_of(live.chat(max_tokens=2)).choices[0].message.content


def test_case_16_no_limit_asked_for(scripts: Scripts) -> None:
    server = scripts.start("早" * 200, context=64, ends=False)
    whole = chat_of(server.chat())
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.total_tokens == 64
    server.state.max_tokens = 3
    assert chat_of(server.chat()).usage.completion_tokens == 3  # type: ignore[union-attr]
    server.state.max_tokens = 1000  # the server's limit gives way to the context, the client's would not
    assert chat_of(server.chat()).usage.total_tokens == 64  # type: ignore[union-attr]
    assert completion_of(server.completion("早")).usage.total_tokens == 64  # type: ignore[union-attr]


def test_case_16_a_full_context_is_no_empty_answer(scripts: Scripts) -> None:
    num_prompt = len(scripts.tokenizers["chatglm2"].prefix_ids) + 3
    server = scripts.start("早", context=num_prompt)
    ids = [*scripts.tokenizers["chatglm2"].prefix_ids, 9, 9, 9]
    assert_refused(server.completion(ids), param="prompt", code="context_length_exceeded")
    assert completion_of(server.completion(ids[:-1])).choices[0].text


def test_case_18_zeros(live: RunningServer) -> None:
    message = assert_refused(live.chat(max_tokens=0, n=0, top_p=0), param="n")
    assert "`n` is 0" in message
    assert "`top_p` is 0" in message
    assert_refused(live.chat(max_tokens=0), param="max_tokens")
    assert_refused(live.chat(max_completion_tokens=0), param="max_completion_tokens")
    assert_refused(live.completion("好", max_tokens=0), param="max_tokens")
    assert_refused(live.chat(top_p=0), param="top_p")
    assert (
        live.post("/", {"prompt": "你好", "max_length": 0, "top_p": 0, "temperature": 0}).status_code == 200
    )


def test_case_19_far_too_much(live: RunningServer) -> None:
    assert_refused(live.chat(max_tokens=10**9), param="max_tokens")
    assert_refused(live.chat(n=10**6), param="n")
    assert_refused(live.completion(["好"] * 129, max_tokens=1), param="prompt")
    assert_refused(live.chat(max_tokens=10**30), param="max_tokens")


def test_case_20_can_never_fit(scripts: Scripts) -> None:
    server = scripts.start("早")
    server.state.chat.engine.most_tokens = 5
    message = assert_refused(server.chat(n=2))
    assert "the cache holds 5" in message
    assert server.state.chat.engine.num_running == 0


def test_two_limits(live: RunningServer) -> None:
    assert_refused(live.chat(max_tokens=2, max_completion_tokens=3), param="max_completion_tokens")
    assert chat_of(live.chat(max_tokens=2, max_completion_tokens=2)).usage.completion_tokens == 2  # type: ignore[union-attr]


def test_answers_of_a_request_are_limited(scripts: Scripts) -> None:
    server = scripts.start("早", limits=RouteLimits(max_choices=4))
    assert len(chat_of(server.chat(n=4)).choices) == 4
    assert_refused(server.completion(["早", "晚"], n=3), param="n")
