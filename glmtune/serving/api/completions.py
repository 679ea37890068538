"""``/v1/completions``: prompts in, what follows them out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from glmtune.inference.requests.chat import ChatEngine
from glmtune.inference.requests.request import Request as EngineRequest
from glmtune.inference.requests.text_stream import completion_text
from glmtune.models.templates.base import TextTokenizer
from glmtune.serving.api.continuation import Continuation
from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.fields.body import check_json_type, checked, parse_object, read_body
from glmtune.serving.api.fields.common import check_common, choices_of, sampling_of
from glmtune.serving.api.fields.completion import CompletionFields, Prompt, check_completion, check_ids
from glmtune.serving.api.fields.extra import ignored_header, unknown_fields
from glmtune.serving.api.models import ServedModel, checked_strength, find_model
from glmtune.serving.api.replies.chat import ReplyHead, new_id
from glmtune.serving.api.replies.completion import CompletionChunks, CompletionReply, TextChoice
from glmtune.serving.api.replies.event_stream import EventStream
from glmtune.serving.api.replies.whole import gathered
from glmtune.serving.api.room import answer_limit
from glmtune.serving.api.running import RunningRequest
from glmtune.serving.api.state import ServingState

PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class AskedCompletion:
    """A request that was read and found right.

    Attributes:
        fields: what it asks.
        model: which is to answer.
        requests: for the engine, one for each answer, those of a prompt one after the other.
        echoes: what the text of each begins with.
        ignored: names of fields that nobody knows.
    """

    fields: CompletionFields
    model: ServedModel
    requests: tuple[EngineRequest, ...]
    echoes: tuple[str, ...]
    ignored: list[str]


async def completions(state: ServingState, request: Request) -> Response:
    """Go on with prompts, in one reply or as a stream."""
    state.ready()
    check_json_type(request)
    raw = await read_body(request)
    asked = await state.reader.read(partial(_read, state), raw)
    fields = asked.fields
    running, continuations = _submitted(state, asked)
    head = ReplyHead(
        id=new_id("cmpl-", 29),
        model=asked.model.name,
        fingerprint=state.fingerprint,
        num_choices=len(asked.requests),
        answers_per_prompt=fields.num_answers,
        has_logprobs=fields.logprobs is not None,
        has_usage_chunk=fields.has_usage_chunk,
    )
    texts = state.token_texts
    choices = [
        TextChoice(index, echo, continuations[index], texts if head.has_logprobs else None)
        for index, echo in enumerate(asked.echoes)
    ]
    headers = ignored_header(asked.ignored)
    if fields.stream:
        wait = state.limits.keep_alive_seconds
        return EventStream(running, CompletionChunks(head, choices), keep_alive_seconds=wait, headers=headers)
    return await gathered(running, CompletionReply(head, choices), request, headers)


def _read(state: ServingState, raw: bytes) -> AskedCompletion:
    """Read a body; in a thread of the reader."""
    chat = state.ready()
    fields = checked(CompletionFields, parse_object(raw))
    ignored = unknown_fields(fields, strict=state.is_strict)
    check_common(fields, max_choices=state.limits.max_choices, num_prompts=len(fields.prompt))
    check_completion(fields)
    if fields.is_prompt_scored and chat.template.bidirectional_context:
        raise ApiError(
            '`logprobs` with `"echo": true` asks how likely each token of the prompt is, but this model reads'
            " its prompt in both directions: no token of it follows from those before. Leave one out.",
            param="logprobs",
            code="unsupported_parameter",
        )
    model = find_model(state, fields.model)
    strength = checked_strength(model, fields)
    requests: list[EngineRequest] = []
    echoes: list[str] = []
    for prompt in fields.prompt:
        ids = _prompt_ids(chat, prompt)
        made = _engine_requests(state, fields, ids, model, strength)
        requests += made
        echo = prompt if isinstance(prompt, str) else _text_of(state, prompt)
        echoes += [echo if fields.echo else ""] * len(made)
    return AskedCompletion(fields, model, tuple(requests), tuple(echoes), ignored)


def _text_of(state: ServingState, ids: tuple[int, ...]) -> str:
    """Return the text of a prompt of ids; command tokens, which ChatGLM3's decoder writes, are none."""
    shown = [token for token in ids if not state.token_texts.is_command(token)]
    return str(state.ready().tokenizer.decode(shown))


def _prompt_ids(chat: ChatEngine, prompt: Prompt) -> tuple[int, ...]:
    """Return the ids of a prompt: of a text as the model's inputs begin and end, ids as they are."""
    tokenizer = cast("TextTokenizer", chat.tokenizer)
    if isinstance(prompt, str):
        return (*tokenizer.prefix_ids, *tokenizer.text_ids(prompt), *tokenizer.suffix_ids)
    check_ids(prompt, len(chat.tokenizer))
    suffix = tokenizer.suffix_ids
    if missing := [token for token in suffix if token not in prompt]:
        raise ApiError(
            f"`prompt` holds no token {missing[0]}, but this model reads every prompt as context, gMASK and"
            f" sop: {suffix} must stand behind the text. Add them, or send the text.",
            param="prompt",
            code="invalid_value",
        )
    return prompt


def _engine_requests(
    state: ServingState, fields: CompletionFields, ids: tuple[int, ...], model: ServedModel, strength: float
) -> list[EngineRequest]:
    chat = state.ready()
    limit = answer_limit(
        len(ids),
        state.engine.max_context_tokens,
        # 0 scores the prompt alone. The engine has no request without a token: one is asked for and dropped.
        asked=None if fields.max_tokens is None else max(fields.max_tokens, 1),
        name="max_tokens",
        default=state.max_tokens,
        param="prompt",
    )
    sampling = sampling_of(
        fields,
        chat.sampling_defaults,
        max_new_tokens=limit,
        logprobs=fields.logprobs,
        prompt_logprobs=fields.logprobs if fields.is_prompt_scored else None,
        vocabulary=len(chat.tokenizer),
    )
    if _reports_end(fields):
        sampling = replace(sampling, ignore_eos=True)
    stream = partial(completion_text, chat.tokenizer, sampling.stop, goes_on=True)
    return [
        EngineRequest(
            prompt_ids=ids,
            sampling=each,
            stop_ids=frozenset(chat.template.stop_ids(cast("TextTokenizer", chat.tokenizer))),
            adapter=model.adapter,
            strength=strength,
            text_stream=stream,
        )
        for each in choices_of(sampling, fields.num_answers)
    ]


def _reports_end(fields: CompletionFields) -> bool:
    """Whether the one token after a scored prompt is told even where it ends the answer.

    lm-evaluation-harness asks for one token behind what it scores and drops the last log-probability, always:
    if an end were left out, it would drop one of the prompt's.
    """
    return fields.is_prompt_scored and fields.max_tokens is not None and fields.max_tokens <= 1


def _submitted(state: ServingState, asked: AskedCompletion) -> tuple[RunningRequest, list[Continuation]]:
    engine, fields = state.engine, asked.fields
    running = RunningRequest(
        path=PATH, model=asked.model.name, is_stream=bool(fields.stream), on_answered=state.on_answered
    )
    continuations: list[Continuation] = []
    for each in asked.requests:
        continuation = Continuation(
            each, is_prompt_only=fields.max_tokens == 0, reports_end=_reports_end(fields)
        )
        running.add(partial(continuation.submit, engine), continuation.events)
        continuations.append(continuation)
    return running, continuations
