"""Replies read with the types of OpenAI's own package, which its client does not check."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.serving.api.running_server import events


def chat_of(reply: httpx.Response) -> ChatCompletion:
    """Read a whole answer."""
    assert reply.status_code == 200, reply.text
    return ChatCompletion.model_validate(reply.json(), strict=True)


def completion_of(reply: httpx.Response) -> Completion:
    """Read a whole continuation; the first token of a scored prompt has no log-probability, which the types forbid."""
    assert reply.status_code == 200, reply.text
    found = reply.json()
    checked = json.loads(json.dumps(found))
    for choice in checked["choices"]:
        for name in ("token_logprobs", "top_logprobs"):
            if choice["logprobs"] and choice["logprobs"][name][:1] == [None]:
                choice["logprobs"][name] = choice["logprobs"][name][1:]
    Completion.model_validate(checked, strict=True)
    return Completion.model_construct(**found)


@dataclass
class Streamed:
    """A stream, read."""

    chunks: list[ChatCompletionChunk]
    raw: list[dict[str, Any]]
    usages: list[Any] = field(default_factory=list)

    def text(self, index: int = 0) -> str:
        found = [choice for chunk in self.chunks for choice in chunk.choices if choice.index == index]
        return "".join(choice.delta.content or "" for choice in found)

    def finishes(self, index: int = 0) -> list[str]:
        found = [choice for chunk in self.chunks for choice in chunk.choices if choice.index == index]
        return [choice.finish_reason for choice in found if choice.finish_reason is not None]


def stream_of(reply: httpx.Response) -> Streamed:
    """Read a stream of chunks up to its last line."""
    found = events(reply)
    assert found[-1] == "[DONE]"
    assert reply.text.endswith("data: [DONE]\n\n")
    raw = [json.loads(each) for each in found[:-1]]
    chunks = [ChatCompletionChunk.model_validate(each, strict=True) for each in raw]
    return Streamed(chunks, raw, [each["usage"] for each in raw if each.get("usage") is not None])


def assert_refused(
    reply: httpx.Response, status: int = 400, param: str | None = None, code: str | None = None
) -> str:
    """Check that a reply is an error in OpenAI's form; return its message."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    if param is not None:
        assert body["error"]["param"] == param, body
    if code is not None:
        assert body["error"]["code"] == code, body
    assert body["error"]["message"]
    return body["error"]["message"]
