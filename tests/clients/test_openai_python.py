"""The official Python client."""

from __future__ import annotations

import openai
import pytest


@pytest.fixture(scope="module")
def client(served: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0)


QUESTION = [{"role": "user", "content": "12+30等于多少？"}]


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="glm-tiny", messages=QUESTION, temperature=0)
    assert "42" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_gives_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="glm-tiny", messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model="glm-tiny",
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_completions_of_text_and_of_ids(client: openai.OpenAI) -> None:
    settings = {"model": "glm-tiny", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    reply = client.completions.create(prompt="今天天气", **settings)
    assert reply.choices[0].text
    by_ids = client.completions.create(prompt=[100, 200, 300], echo=True, **settings)
    logprobs = by_ids.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["glm-tiny"]


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="glm-tiny"):
        client.chat.completions.create(model="glm-tinny", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="glm-tiny", messages=QUESTION, temperature=-1)
