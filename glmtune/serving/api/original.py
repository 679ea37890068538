"""``POST /``: the contract of the official ``api.py``, for programs that were written for it.

Source:
    ``api.py`` of THUDM/ChatGLM-6B and THUDM/ChatGLM2-6B: JSON whatever the content type says; the reply holds
    ``response``, ``history``, ``status`` 200 and the local ``time``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from glmtune.errors import DataError
from glmtune.inference.requests.chat import AnswerEvent
from glmtune.inference.requests.sampling import Sampling
from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.fields.body import checked, parse_object, read_body
from glmtune.serving.api.fields.extra import ignored_header, unknown_fields
from glmtune.serving.api.fields.original import (
    OFFICIAL_MAX_LENGTH,
    OFFICIAL_TEMPERATURE,
    OFFICIAL_TOP_P,
    OriginalFields,
)
from glmtune.serving.api.models import ServedModel, find_model
from glmtune.serving.api.replies.chat import ChatChoice, Json
from glmtune.serving.api.replies.whole import gathered
from glmtune.serving.api.running import RunningRequest
from glmtune.serving.api.state import ServingState

PATH = "/"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True, slots=True)
class AskedOriginal:
    """A request that was read and found right.

    Attributes:
        fields: what it asks.
        model: the default one.
        prompt_ids: the conversation as the model reads it.
        sampling: how tokens are chosen.
        is_paired: whether the history is of pairs.
        has_tools: whether a system message of the history announces tools.
        ignored: names of fields that nobody knows.
    """

    fields: OriginalFields
    model: ServedModel
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    is_paired: bool
    has_tools: bool
    ignored: list[str]


async def original(state: ServingState, request: Request) -> Response:
    """Answer a question in its history."""
    state.ready()
    raw = await read_body(request)
    asked = await state.reader.read(partial(_read, state), raw)
    running = RunningRequest(
        path=PATH, model=asked.model.name, is_stream=False, on_answered=state.on_answered
    )
    submit = partial(
        state.ready().submit,
        asked.prompt_ids,
        sampling=asked.sampling,
        adapter=asked.model.adapter,
        has_tools=asked.has_tools,
    )
    running.add(lambda put: submit(on_event=put))
    return await gathered(running, _OriginalReply(asked), request, ignored_header(asked.ignored))


def _read(state: ServingState, raw: bytes) -> AskedOriginal:
    """Read a body; in a thread of the reader."""
    chat = state.ready()
    fields = checked(OriginalFields, parse_object(raw))
    ignored = unknown_fields(fields, strict=state.is_strict)
    messages: list[Any] = []
    for turn in fields.history:
        if isinstance(turn, dict):
            messages.append(turn)
        else:
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    try:
        prompt_ids = chat.prompt_ids([*messages, {"role": "user", "content": fields.prompt}])
    except DataError as error:
        raise ApiError(str(error), param="history", code="invalid_value") from None
    context = min(fields.max_length or OFFICIAL_MAX_LENGTH, state.engine.max_context_tokens)
    if len(prompt_ids) >= context:
        raise ApiError(
            f"The conversation has {len(prompt_ids)} tokens, but prompt and answer together may have"
            f" {context} (`max_length`; the model's context is {state.engine.max_context_tokens}). Raise"
            " it, or drop the oldest turns of the history.",
            param="max_length",
            code="context_length_exceeded",
        )
    # `or`: the official file, too, takes its default for 0.
    sampling = replace(
        chat.sampling_defaults,
        max_new_tokens=context - len(prompt_ids),
        top_p=fields.top_p or OFFICIAL_TOP_P,
        temperature=fields.temperature or OFFICIAL_TEMPERATURE,
    )
    return AskedOriginal(
        fields,
        find_model(state, None),
        prompt_ids,
        sampling,
        is_paired=fields.is_paired or not (fields.history or chat.template.knows_tools),
        has_tools=any(turn.get("tools") for turn in messages),
        ignored=ignored,
    )


class _OriginalReply:
    """Gathers an answer to the official reply; the history goes on in the form in which it came."""

    def __init__(self, asked: AskedOriginal) -> None:
        self._asked = asked
        self._choice = ChatChoice()

    def add(self, index: int, event: AnswerEvent) -> None:
        """Take the next event."""
        del index  # there is one answer
        self._choice.add(event)

    def json(self) -> Json:
        """Return the reply."""
        asked, choice = self._asked, self._choice
        response: str | Json = choice.text
        name = ""
        if choice.calls:
            name, arguments = choice.calls[0]
            response = {"name": name, "parameters": arguments}
        if asked.is_paired:
            turns: list[Any] = [[asked.fields.prompt, response]]
        else:
            written = choice.calls[0][1] if choice.calls else choice.text
            turns = [
                {"role": "user", "content": asked.fields.prompt},
                {"role": "assistant", "metadata": name, "content": written},
            ]
        return {
            "response": response,
            "history": [*asked.fields.history, *turns],
            "status": 200,
            "time": time.strftime(TIME_FORMAT),
        }
