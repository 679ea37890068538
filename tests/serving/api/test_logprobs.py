"""SERVER_CASES, F: log-probabilities; and the forms of ``/v1/completions``."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.serving.api.conftest import GENERATIONS, WITH_TOOLS, Scripts
from tests.serving.api.doubles import logprob_of
from tests.serving.api.replies import assert_refused, chat_of, completion_of, stream_of
from tests.serving.api.running_server import RunningServer


@pytest.mark.parametrize("family", GENERATIONS)
@pytest.mark.parametrize("fields", [{}, {"top_logprobs": None}, {"top_logprobs": 0}])
def test_case_39_without_alternatives(family: str, fields: dict[str, Any], scripts: Scripts) -> None:
    server = scripts.start("好😀龘早", family)
    tokens = scripts.tokenizers[family].text_ids("好😀龘早")
    whole = chat_of(server.chat(logprobs=True, **fields)).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert [entry.logprob for entry in whole.content] == [logprob_of(token) for token in tokens]
    assert all(entry.top_logprobs == [] for entry in whole.content)
    data = b"".join(bytes(entry.bytes or []) for entry in whole.content)
    assert data.decode().strip() == "好😀龘早"
    streamed = stream_of(server.chat(logprobs=True, stream=True, **fields)).chunks
    told = [
        choice.logprobs.content or [] for chunk in streamed for choice in chunk.choices if choice.logprobs
    ]
    assert [entry.model_dump() for each in told for entry in each] == [
        entry.model_dump() for entry in whole.content
    ]


def test_case_39_alternatives(live: RunningServer) -> None:
    choice = chat_of(live.chat(logprobs=True, top_logprobs=3, temperature=0, max_tokens=5)).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 5
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert math.isfinite(entry.logprob)
        assert entry.logprob == max(other.logprob for other in entry.top_logprobs)
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1.0001


def test_case_39_rules(live: RunningServer) -> None:
    assert chat_of(live.chat(max_tokens=2)).choices[0].logprobs is None
    assert_refused(live.chat(top_logprobs=2), param="top_logprobs")
    assert_refused(live.chat(logprobs=True, top_logprobs=21), param="top_logprobs")
    assert_refused(live.chat(logprobs=True, top_logprobs=-1), param="top_logprobs")
    assert_refused(live.chat(logprobs=1), param="logprobs")
    assert_refused(live.completion("x", logprobs=21), param="logprobs")
    assert_refused(live.completion("x", logprobs=True), param="logprobs")


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_case_41_log_probabilities_of_the_prompt(max_tokens: int, scripts: Scripts) -> None:
    tokenizer = scripts.tokenizers["chatglm2"]
    server = scripts.start("早")
    prompts = [[*tokenizer.prefix_ids, *tokenizer.text_ids(text)] for text in ("今天想去哪里？", "早点休息")]
    found = completion_of(
        server.completion(prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    )
    for prompt, choice in zip(prompts, found.choices, strict=True):
        answer = tokenizer.text_ids("早")[:max_tokens]
        told = choice.logprobs
        assert told is not None
        tokens = [*prompt, *answer]
        assert told.token_logprobs == [None, *map(logprob_of, tokens[1:])]
        assert told.top_logprobs is not None
        assert told.top_logprobs[0] is None
        assert [max(top.values()) for top in told.top_logprobs[1:]] == told.token_logprobs[1:]
        assert len(told.tokens or []) == len(told.text_offset or []) == len(tokens)
        assert choice.finish_reason == "length"
        assert choice.text.startswith(str(tokenizer.decode(prompt)))
    assert found.usage is not None
    assert found.usage.completion_tokens == 2 * max_tokens
    assert found.usage.prompt_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("family", ["chatglm2", *WITH_TOOLS])
def test_case_41_an_end_is_told_too(family: str, scripts: Scripts) -> None:
    """lm-evaluation-harness drops the last log-probability, which must not be the prompt's."""
    tokenizer = scripts.tokenizers[family]
    server = scripts.start("", family)
    prompt = [*tokenizer.prefix_ids, *tokenizer.text_ids("早点休息")]
    choice = completion_of(server.completion(prompt, echo=True, logprobs=1, max_tokens=1)).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(prompt) + 1
    assert choice.finish_reason == "stop"
    assert choice.text.strip() == "早点休息"


def test_case_41_live(live: RunningServer) -> None:
    ids = live.state.chat.tokenizer("今天想去哪里？").input_ids  # type: ignore[union-attr]
    choice = completion_of(live.completion(ids, echo=True, logprobs=2, max_tokens=1, temperature=0)).choices[
        0
    ]
    assert choice.logprobs is not None
    told = choice.logprobs.token_logprobs
    assert told is not None
    assert told[0] is None
    assert len(told) == len(ids) + 1
    assert all(value is not None and math.isfinite(value) and value <= 0 for value in told[1:])
    again = completion_of(live.completion(ids, echo=True, logprobs=2, max_tokens=0)).choices[0].logprobs
    assert again is not None
    assert again.token_logprobs == pytest.approx(told[:-1], abs=1e-4)


def test_case_41_not_where_the_prompt_is_read_in_both_directions(scripts: Scripts) -> None:
    server = scripts.start("早", "chatglm")
    assert_refused(server.completion("x", echo=True, logprobs=1), param="logprobs")
    assert completion_of(server.completion("早点", echo=True)).choices[0].text.startswith("早点")
    assert completion_of(server.completion("早点", logprobs=1)).choices[0].logprobs is not None


def test_offsets_and_texts_of_tokens(scripts: Scripts) -> None:
    server = scripts.start("点😀!")
    choice = completion_of(server.completion("早 ok", echo=True, logprobs=0)).choices[0]
    told = choice.logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.text_offset is not None
    places = {token: place for token, place in zip(told.tokens, told.text_offset, strict=True)}
    assert choice.text[places["!"]] == "!"
    assert [token for token in told.tokens if token.startswith("bytes:")] == [
        r"bytes:\xf0",
        r"bytes:\x9f",
        r"bytes:\x98",
        r"bytes:\x80",
    ]
    assert told.tokens[:2] == ["[gMASK]", "sop"]
    assert told.text_offset[:2] == [0, 0]
    assert all(len(top) == 1 for top in (told.top_logprobs or [])[1:])


@pytest.mark.parametrize("prompt", ["早", ["早"], [9, 9], [[9, 9]]])
def test_forms_of_prompts(prompt: object, scripts: Scripts) -> None:
    server = scripts.start("点")
    found = completion_of(server.completion(prompt, n=2))
    assert [choice.index for choice in found.choices] == [0, 1]
    assert [choice.text.strip() for choice in found.choices] == ["点", "点"]
    tokenizer = scripts.tokenizers["chatglm2"]
    expected = (9, 9) if prompt in ([9, 9], [[9, 9]]) else (*tokenizer.prefix_ids, *tokenizer.text_ids("早"))
    assert server.state.chat.engine.requests[0].prompt_ids == expected


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], ["a", [1]], [1.5], [-1], [True], {"a": 1}, 7, [["a"]], [10**9]]
)
def test_no_prompts(prompt: object, live: RunningServer) -> None:
    assert_refused(live.completion(prompt), param="prompt")


def test_ids_without_an_end_of_context(scripts: Scripts) -> None:
    server = scripts.start("点", "chatglm")
    assert "gMASK" in assert_refused(server.completion([9, 9]), param="prompt")


def test_a_blank_in_front_stays(scripts: Scripts) -> None:
    server = scripts.start("many shirts")
    ids = scripts.tokenizers["chatglm2"].text_ids("many shirts")
    assert completion_of(server.completion("How")).choices[0].text == " many shirts"
    assert len(server.state.chat.engine.requests[0].prompt_ids) > 2
    assert ids
