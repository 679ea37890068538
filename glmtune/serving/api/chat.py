"""``/v1/chat/completions``: a conversation in, its answer out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from glmtune.errors import ConfigError, DataError
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.requests.tool_choice import tool_to_call
from glmtune.models.templates.folder import FolderTemplate
from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.fields.body import check_json_type, checked, parse_object, read_body
from glmtune.serving.api.fields.chat import ChatFields, answer_tokens, check_chat
from glmtune.serving.api.fields.common import check_common, choices_of, sampling_of
from glmtune.serving.api.fields.conversation import conversation, described_tools
from glmtune.serving.api.fields.extra import ignored_header, unknown_fields
from glmtune.serving.api.models import ServedModel, checked_strength, find_model
from glmtune.serving.api.replies.chat import ChatChunks, ChatReply, ReplyHead, new_id
from glmtune.serving.api.replies.event_stream import EventStream
from glmtune.serving.api.replies.whole import gathered
from glmtune.serving.api.room import answer_limit
from glmtune.serving.api.running import RunningRequest
from glmtune.serving.api.state import ServingState

PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A conversation as the model reads it.

    Attributes:
        ids: of its tokens.
        has_tools: tools were announced in it.
        call: the tool that the answer has to call; empty: the model decides.
        not_shown: what of the messages no template shows.
    """

    ids: tuple[int, ...]
    has_tools: bool
    call: str
    not_shown: list[str]


@dataclass(frozen=True, slots=True)
class AskedChat:
    """A request that was read and found right.

    Attributes:
        fields: what it asks.
        model: which is to answer.
        strength: of the model's prefix, or scale of its LoRA.
        prompt: the conversation as the model reads it.
        samplings: of each answer.
        ignored: names of fields that nobody knows.
    """

    fields: ChatFields
    model: ServedModel
    strength: float
    prompt: _Prompt
    samplings: tuple[Sampling, ...]
    ignored: list[str]


async def chat_completions(state: ServingState, request: Request) -> Response:
    """Answer a conversation, in one reply or as a stream."""
    state.ready()
    check_json_type(request)
    raw = await read_body(request)
    asked = await state.reader.read(partial(_read, state), raw)
    fields = asked.fields
    # From here to the reply nothing waits, so nothing can end the task between the engine and who watches it.
    running = _submitted(state, asked)
    head = ReplyHead(
        id=new_id("chatcmpl-", 29),
        model=asked.model.name,
        fingerprint=state.fingerprint,
        num_choices=fields.num_answers,
        answers_per_prompt=fields.num_answers,
        has_logprobs=fields.num_logprobs is not None,
        has_usage_chunk=fields.has_usage_chunk,
    )
    headers = ignored_header(asked.ignored)
    if fields.stream:
        chunks, wait = ChatChunks(head, state.token_texts), state.limits.keep_alive_seconds
        return EventStream(running, chunks, keep_alive_seconds=wait, headers=headers)
    return await gathered(running, ChatReply(head, state.token_texts), request, headers)


def _read(state: ServingState, raw: bytes) -> AskedChat:
    """Read a body; in a thread of the reader."""
    chat, engine = state.ready(), state.engine
    fields = checked(ChatFields, parse_object(raw))
    ignored = unknown_fields(fields, strict=state.is_strict)
    check_common(fields, max_choices=state.limits.max_choices)
    check_chat(fields)
    name, limit = answer_tokens(fields)
    model = find_model(state, fields.model)
    strength = checked_strength(model, fields)
    prompt = _prompt(state, fields)
    sampling = sampling_of(
        fields,
        chat.sampling_defaults,
        max_new_tokens=answer_limit(
            len(prompt.ids),
            engine.max_context_tokens,
            asked=limit,
            name=name,
            default=state.max_tokens,
            param="messages",
        ),
        logprobs=fields.num_logprobs,
        vocabulary=len(chat.tokenizer),
    )
    samplings = choices_of(sampling, fields.num_answers)
    return AskedChat(fields, model, strength, prompt, samplings, ignored + prompt.not_shown)


def _prompt(state: ServingState, fields: ChatFields) -> _Prompt:
    chat = state.ready()
    if fields.tools and not chat.template.knows_tools:
        raise ApiError(
            f"`tools` holds {len(fields.tools)}, but `{state.names[0]}` knows no tools (template"
            f" `{chat.template.name}`). Leave them out, or serve ChatGLM3 or GLM-4.",
            param="tools",
            code="unsupported_parameter",
        )
    may_think = chat.template.name == FolderTemplate.name
    messages, not_shown = conversation(fields.messages, strict=state.is_strict, may_think=may_think)
    are_announced, call = _tool_choice(fields)
    tools = described_tools(fields.tools) if are_announced else []
    continues = bool(fields.continue_final_message)
    if messages[-1]["role"] == "assistant" and not continues:
        raise ApiError(
            f"The last message (`messages[{len(fields.messages) - 1}]`) is the assistant's, so nothing is"
            ' left to answer. End with a question, or add `"continue_final_message": true` to go on with it.',
            param="messages",
            code="invalid_value",
        )
    if continues and messages[-1]["role"] != "assistant":
        raise ApiError(
            "`continue_final_message` is true, but the last message is not the assistant's. Leave it out.",
            param="continue_final_message",
            code="invalid_value",
        )
    try:
        prompt_ids = chat.prompt_ids(messages, tools=tools, continues=continues, call=call)
    except DataError as error:
        raise ApiError(str(error), param="messages", code="invalid_value") from None
    return _Prompt(prompt_ids, bool(tools), call, not_shown)


def _tool_choice(fields: ChatFields) -> tuple[bool, str]:
    """Return whether tools are announced, and which one has to be called."""
    try:
        return tool_to_call(fields.tools, fields.tool_choice)
    except ConfigError as error:
        raise ApiError(str(error), param="tool_choice", code="unsupported_parameter") from None


def _submitted(state: ServingState, asked: AskedChat) -> RunningRequest:
    chat, fields = state.ready(), asked.fields
    running = RunningRequest(
        path=PATH,
        model=asked.model.name,
        is_stream=bool(fields.stream),
        ends_at_first_call=fields.parallel_tool_calls is False,
        on_answered=state.on_answered,
    )
    for sampling in asked.samplings:
        submit = partial(
            chat.submit,
            asked.prompt.ids,
            sampling=sampling,
            adapter=asked.model.adapter,
            strength=asked.strength,
            has_tools=asked.prompt.has_tools,
            continues=bool(fields.continue_final_message),
            call=asked.prompt.call,
        )
        running.add(lambda put, submit=submit: submit(on_event=put))
    return running
