"""What `apply_chat_template` of our tokenizers does: chat messages of any library through our renderer.

The releases' Jinja templates render a text, in which nothing tells a role token from a user who typed its
name. So messages are brought into our form, checked, and encoded by the family's template; a setting that
asks for another template is refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers.utils import get_json_schema

from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message
from glmtune.models.templates.base import check_last
from glmtune.models.templates.folder import FolderTemplate
from glmtune.models.templates.renderer import Template, TextTokenizer, template_for
from glmtune.models.templates.thinking import join_thoughts
from glmtune.models.templates.tool_calls import (
    CARRIED_BY_ORDER,
    described,
    read_calls,
    read_tools,
    write_tools,
)

ChatMessage = Message | Mapping[str, Any]
ChatConversation = Sequence[ChatMessage]
Tool = Mapping[str, Any] | Callable[..., object]

THOUGHTS_KEY = "reasoning_content"
"""Thoughts of an answer beside its ``content``, as DeepSeek and vLLM name them."""
_ENCODING_SETTINGS = (
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "padding_side",
    "pad_to_multiple_of",
    "return_attention_mask",
    "verbose",
)
_KEYS = ("role", "content", "metadata", "tools", "tool_calls", "function_call", *sorted(CARRIED_BY_ORDER))
_ROLE_NAMES = {"tool": "observation"}
"""Role names of OpenAI's format that GLM calls otherwise."""


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A conversation as ids.

    Attributes:
        input_ids: the ids, ``[gMASK] sop`` first.
        assistant_mask: 1 where the model wrote the token, or None where it was not asked for.
    """

    input_ids: list[int]
    assistant_mask: list[int] | None = None


def chat_batch(
    conversation: ChatConversation | Sequence[ChatConversation],
) -> tuple[Sequence[ChatConversation], bool]:
    """Return the conversations, and whether a batch of them was given.

    Raises:
        DataError: nothing was given.
    """
    if not conversation:
        raise DataError("The conversation holds 0 messages, but a prompt needs at least 1. Give a question.")
    batched = isinstance(conversation[0], list | tuple)
    return cast("Sequence[ChatConversation]", conversation if batched else [conversation]), batched


def chat_messages(
    tokenizer: TextTokenizer, conversation: ChatConversation, tools: Sequence[Tool] | None = None
) -> list[Message]:
    """Turn chat messages into ours.

    Args:
        tokenizer: one of ours; its family decides the template.
        conversation: messages of ours or dictionaries with ``role``, ``content`` and, for ChatGLM3 and GLM-4,
            ``metadata``, ``tools`` (on a system message) and OpenAI's ``tool_calls``; the role ``tool`` means
            ``observation``. An answer may have ``reasoning_content``, its thoughts, for a folder's template.
        tools: descriptions, or functions with docstrings, to announce in the system message.

    Raises:
        DataError: a message has another shape, or tools in a wrong place.
    """
    template = template_for(tokenizer)
    messages = [
        message
        for place, item in enumerate(conversation, start=1)
        for message in _messages(item, f"Message {place}", template)
    ]
    if tools:
        _check_tools(template, tools, "The conversation")
        if not template.tools_introduction and (not messages or messages[0].role != "system"):
            messages.insert(0, Message("system", ""))  # a folder's own template introduces tools itself
        if not messages or messages[0].role != "system":
            raise DataError(
                "The conversation has tools but no system message, and tools stand below one. Put a system "
                "message first that says what the tools are for."
            )
        messages[0] = replace(messages[0], tools=_tools_text(tools))
    return write_tools(template, messages)


def _messages(item: ChatMessage, place: str, template: Template) -> list[Message]:
    """Return the messages that one of another library stands for: its text, and a message for each call."""
    if isinstance(item, Message):
        return [item]
    if not isinstance(item, Mapping):
        raise DataError(
            f"{place} is a {type(item).__name__}, but it must be a Message or a dictionary with "
            "`role` and `content`. Wrap it in one."
        )
    given = {key: value for key, value in item.items() if value is not None}
    thoughts = _thoughts(given, place) if template.name == FolderTemplate.name else ""
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        raise DataError(
            f"{place} has the key `{unknown[0]}`, which no GLM template can show; known keys: "
            f"{', '.join(_KEYS)}. Write it into `content` (a tool call: its name into `metadata`)."
        )
    role, content = given.get("role"), given.get("content", "")
    if not isinstance(role, str) or not isinstance(content, str):
        wrong, value = ("role", role) if not isinstance(role, str) else ("content", content)
        raise DataError(
            f"{place}: `{wrong}` is {value!r}, but it must be text. Join a message's parts into one."
        )
    role = _ROLE_NAMES.get(role, role)
    tools = ""
    if given.get("tools"):
        if role != "system":
            raise DataError(
                f"{place} has the role `{role}` and carries `tools`, but only a system message "
                "announces tools. Move them there."
            )
        _check_tools(template, given["tools"], place)
        tools = _tools_text(given["tools"])
    calls = read_calls(given, place)
    if calls and role != "assistant":
        raise DataError(f"{place} has the role `{role}` and calls tools, but only `assistant` does.")
    metadata, says_something = str(given.get("metadata", "")), bool(content)
    if not metadata:  # thoughts in front of a call have no place in a template: it is shown without them
        content = join_thoughts(thoughts, content)
    text = Message(role, content, metadata, tools=tools)
    return [text, *calls] if says_something or not calls else calls


def _thoughts(given: dict[str, Any], place: str) -> str:
    """Take the thoughts of an answer out of a message, empty where it has none."""
    thoughts = given.pop(THOUGHTS_KEY, "")
    if not isinstance(thoughts, str) or (thoughts.strip() and given.get("role") != "assistant"):
        raise DataError(
            f"{place}: `{THOUGHTS_KEY}` is {str(thoughts)[:40]!r} of the role `{given.get('role')}`, but it "
            "must be text, and only `assistant` thinks. Move it into the answer, or leave it out."
        )
    return thoughts


def _check_tools(template: Template, tools: Sequence[Tool], where: str) -> None:
    if not template.knows_tools:
        names = ", ".join(f"`{described(_schema(tool)).get('name')}`" for tool in tools)
        raise DataError(
            f"{where} announces tools, but template `{template.name}` knows no tools; given: {names}. "
            "Drop them, or use ChatGLM3."
        )


def _tools_text(tools: Sequence[Tool]) -> str:
    return read_tools([_schema(tool) for tool in tools], "tools")


def _schema(tool: Tool) -> Mapping[str, Any]:
    """Return the description of a tool, made of its docstring if it is a function."""
    return tool if isinstance(tool, Mapping) else get_json_schema(tool)


def encode_chat(
    tokenizer: TextTokenizer,
    messages: Sequence[Message],
    *,
    generation_prompt: bool = False,
    continue_final: bool = False,
    assistant_mask: bool = False,
) -> EncodedChat:
    """Encode a conversation for generation or for training.

    Args:
        tokenizer: one of ours; its family decides the template.
        messages: oldest first.
        generation_prompt: end with the prompt for an answer; the last message must then be no answer.
        continue_final: leave a last answer open, without the id that ends it.
        assistant_mask: also say which tokens the model wrote.

    Raises:
        DataError: the messages do not fit the template or the mode asked for.
    """
    template = template_for(tokenizer)
    if generation_prompt or not messages or messages[-1].role != "assistant":
        if continue_final or assistant_mask:
            option = "continue_final_message" if continue_final else "return_assistant_tokens_mask"
            last = messages[-1].role if messages else "missing"
            raise DataError(
                f"`{option}` needs a last message of the role `assistant` and no `add_generation_prompt`, "
                f"but the last role is `{last}` and add_generation_prompt={generation_prompt}. Add the "
                "answer, or drop one of the two."
            )
        return EncodedChat(template.encode_prompt(tokenizer, messages, generation_prompt=generation_prompt))
    return _encode_answered(template, tokenizer, messages, continue_final, assistant_mask)


def _encode_answered(
    template: Template, tokenizer: TextTokenizer, messages: Sequence[Message], open_end: bool, with_mask: bool
) -> EncodedChat:
    """Encode a conversation that ends with an answer."""
    # ChatGLM-6B and ChatGLM2 encode earlier answers as part of the prompt: the mask of several answers
    # cannot be given then, and `encode_conversation` says so.
    num_answers = sum(message.role == "assistant" for message in messages)
    if template.one_row_per_conversation or (with_mask and num_answers > 1):
        ids, loss = template.encode_conversation(tokenizer, messages)
    else:
        prompt = template.encode_prompt(tokenizer, messages[:-1])
        answer = template.encode_answer(tokenizer, messages[-1])
        ids, loss = prompt + answer, [False] * len(prompt) + [True] * len(answer)
    if open_end:
        ids, loss = ids[:-1], loss[:-1]
    return EncodedChat(ids, [int(flag) for flag in loss] if with_mask else None)


def render_chat(tokenizer: TextTokenizer, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    """Return a conversation as text, with the prompt for an answer only where it is asked for.

    Raises:
        DataError: a prompt for an answer is asked for behind an answer, or the order does not fit.
    """
    if generation_prompt:
        check_last(messages, ("user", "observation"))
    return template_for(tokenizer).render(messages, generation_prompt=generation_prompt)


def encoding_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for padding, truncation and tensors.

    Args:
        given: what the caller of ``apply_chat_template`` passed on; None and False count as not given.

    Raises:
        ConfigError: a setting that our renderer cannot obey.
    """
    # None and False pass: other libraries hand every argument on, whether their user gave it or not.
    for name, value in given.items():
        if name not in _ENCODING_SETTINGS and name != "sanitize_control_tokens" and value:
            raise ConfigError(
                f"`apply_chat_template` got {name}={str(value)[:60]!r}, but glmtune's own renderer writes "
                f"the prompt and obeys only {', '.join(_ENCODING_SETTINGS)}. Drop the argument; another "
                "prompt can be rendered as text and encoded with the tokenizer."
            )
    return {name: value for name, value in given.items() if name in _ENCODING_SETTINGS}


def spread_masks(
    chats: Sequence[EncodedChat], attention: Sequence[Sequence[int]], *, keep_start: bool
) -> list[list[int]]:
    """Lay assistant masks out like rows that were truncated and padded.

    Args:
        chats: encoded with ``assistant_mask=True``.
        attention: the rows' attention masks, 1 at real tokens.
        keep_start: truncation kept the start of a row rather than its end.

    Returns:
        Rows as long as those of ``attention``, 0 on padding.
    """
    rows: list[list[int]] = []
    for chat, row in zip(chats, attention, strict=True):
        mask = chat.assistant_mask or []
        num_real = int(sum(row))
        # Padding shows in the attention mask, truncation only in the number of tokens left.
        kept = iter(mask[:num_real] if keep_start else mask[len(mask) - num_real :])
        rows.append([next(kept) if real else 0 for real in row])
    return rows
