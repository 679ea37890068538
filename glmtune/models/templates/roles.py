r"""The templates of ChatGLM3 and GLM-4, where every message opens with the token of its role.

As ids, a conversation that goes on after an answer (``\n`` ends the metadata, here empty)::

    [gMASK] sop <|user|> \n question <|assistant|> \n answer <|user|> \n question <|assistant|>
                                                  ------------------

What is underlined the model writes, and it carries loss: the next role's token is what ends an answer.

The tokenizer knows role tokens as ids alone, so every message is encoded for itself, and its text can hold no
role.

Sources:
    ``build_chat_input`` in ``tokenization_chatglm.py`` and ``process_response`` in ``modeling_chatglm.py`` of
    THUDM/chatglm3-6b; ``apply_chat_template`` in ``tokenization_chatglm.py`` of THUDM/glm-4-9b-chat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar

from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates.base import TextTokenizer, check_last, check_roles
from glmtune.models.templates.responses import fill_in_year, split_messages

_ASSISTANT = "<|assistant|>"


class _RoleTemplate:
    """What the templates have in common where every message opens with the token of its role."""

    name: ClassVar[str]
    one_row_per_conversation: bool = True
    knows_tools: bool = True
    tools_introduction: ClassVar[str]
    bidirectional_context: ClassVar[bool] = False
    answer_opening: str = ""
    _opening: ClassVar[str] = ""

    def _shown(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages that appear in a prompt."""
        return messages

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """Return the messages with the names of their role tokens, each on a line with the metadata."""
        check_roles(messages)
        parts = [f"<|{item.role}|>{item.metadata}\n{item.content}" for item in self._shown(messages)]
        ending = _ASSISTANT if generation_prompt and messages[-1].role != "assistant" else ""
        return self._opening + "".join(parts) + ending

    def encode_prompt(
        self, tokenizer: TextTokenizer, messages: Sequence[Message], *, generation_prompt: bool = True
    ) -> list[int]:
        """Return ``[gMASK] sop``, the messages, and the assistant's id.

        Raises:
            DataError: the last message is no question and no tool's result, or metadata of several lines.
        """
        check_last(messages, ("user", "observation"))
        ids = tokenizer.prefix_ids
        for message in self._shown(messages):
            ids += _message_ids(tokenizer, message)
        return [*ids, tokenizer.get_command(_ASSISTANT)] if generation_prompt else ids

    def encode_answer(self, tokenizer: TextTokenizer, answer: Message) -> list[int]:
        """Return metadata, line break and content, and the id that ends the answer.

        Raises:
            DataError: metadata of several lines.
        """
        return [*_body_ids(tokenizer, answer), _end_id(tokenizer, answer)]

    def encode_continuation(self, tokenizer: TextTokenizer, messages: Sequence[Message]) -> list[int]:
        """Return the last message and the assistant's id.

        Raises:
            DataError: as `encode_prompt`.
        """
        check_last(messages, ("user", "observation"))
        if len(messages) == 1:
            return self.encode_prompt(tokenizer, messages)
        ids = [token for item in self._shown(messages[-1:]) for token in _message_ids(tokenizer, item)]
        return [*ids, tokenizer.get_command(_ASSISTANT)]

    def encode_conversation(
        self, tokenizer: TextTokenizer, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]:
        """Return all ids; loss falls on what the model writes: every answer and the token that ends it.

        Raises:
            DataError: the last message is no answer, or metadata of several lines.
        """
        check_last(messages, ("assistant",))
        ids = tokenizer.prefix_ids
        mask = [False] * len(ids)
        ends_answer = False
        # The last answer is learnt even where it is empty, which `_shown` of GLM-4 would leave out.
        for message in [*self._shown(messages[:-1]), messages[-1]]:
            body = _body_ids(tokenizer, message)
            answered = message.role == "assistant" and message.has_loss
            ids += [tokenizer.get_command(f"<|{message.role}|>"), *body]
            mask += [ends_answer, *[answered] * len(body)]
            ends_answer = answered
        return [*ids, _end_id(tokenizer, messages[-1])], [*mask, messages[-1].has_loss]

    def stop_ids(self, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """Return the end id and the roles that take over: user and observation."""
        return (tokenizer.end_id, tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>"))

    def clean_answer(self, text: str) -> str:
        """Return the last message written: its stripped text, or a tool call, the tool's name first."""
        last = split_messages(text)[-1]
        return f"{last.metadata}\n{last.content}" if last.metadata else fill_in_year(last.content)


class ChatGLM3Template(_RoleTemplate):
    """Role tokens of ChatGLM3.

    A message is the id of its role, the ids of its metadata and a line break, and the ids of its content;
    metadata is a tool's name and mostly empty. The prompt ends with the assistant's id, so the model itself
    writes the line break (or a tool's name) and then the answer. An answer ends with the end id, an answer
    that calls a tool with ``<|observation|>``, after which the tool's result follows; inside a conversation
    the role token of the next message ends it.
    """

    name: ClassVar[str] = "chatglm3"
    # With these words the release was tuned to call tools; other words make fewer and worse calls.
    tools_introduction: ClassVar[str] = (
        "Answer the following questions as best as you can. You have access to the following tools:"
    )

    def announce_tools(self, content: str, tools: Sequence[Mapping[str, object]]) -> Message:
        """Return a system message with the descriptions as indented JSON under its text."""
        return system_with_tools(content, tools)

    def call_text(self, arguments: Mapping[str, object]) -> str:
        """Return a call of ``tool_call`` in a fenced block of Python; the tool's name is metadata."""
        words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        if not all(name.isidentifier() for name in arguments):  # Python has no other names for arguments
            words = f"**{dict(arguments)!r}"
        return f"```python\ntool_call({words})\n```"


class GLM4Template(_RoleTemplate):
    """Role tokens of GLM-4, laid out as ChatGLM3's; messages without content do not appear."""

    name: ClassVar[str] = "glm4"
    # The sentence about itself that the release writes above tools.
    tools_introduction: ClassVar[str] = (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。"
    )
    _opening: ClassVar[str] = "[gMASK]<sop>"

    def _shown(self, messages: Sequence[Message]) -> Sequence[Message]:
        return [message for message in messages if message.content]

    def announce_tools(self, content: str, tools: Sequence[Mapping[str, object]]) -> Message:
        """Return a system message with a heading and the description of each tool.

        The release writes a sentence about itself where ``content`` stands here. Its wording is Chinese
        whatever the conversation's language is.

        Raises:
            DataError: a description has no ``name``.
        """
        parts = [f"{content}\n\n# 可用工具".lstrip("\n")]  # nothing stands in front where no text does
        for tool in tools:
            if "name" not in tool:
                raise DataError(
                    f"A tool is described as {str(dict(tool))[:60]}, but GLM-4 calls tools by their `name`. "
                    "Give it a name, or describe it in the system message's content."
                )
            description = json.dumps(dict(tool), indent=4, ensure_ascii=False)
            parts.append(
                f"## {tool['name']}\n\n{description}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
            )
        return Message("system", "\n\n".join(parts))

    def call_text(self, arguments: Mapping[str, object]) -> str:
        """Return the arguments as JSON; the tool's name is metadata."""
        return json.dumps(dict(arguments), ensure_ascii=False)


def system_with_tools(content: str, tools: Sequence[Mapping[str, object]]) -> Message:
    """Write the system message that announces tools to ChatGLM3.

    Args:
        content: what the system message says.
        tools: their descriptions; written as indented JSON under the text.
    """
    return Message("system", f"{content}\n{json.dumps(list(tools), indent=4, ensure_ascii=False)}")


def _body_ids(tokenizer: TextTokenizer, message: Message) -> list[int]:
    if "\n" in message.metadata:
        raise DataError(
            f"The metadata of a message is {message.metadata!r}, but it must be one line: a tool's name or "
            "nothing. Move the rest to the content."
        )
    # Encoded apart, as the release does: together, the line break could melt into one piece with the text.
    return tokenizer.text_ids(f"{message.metadata}\n") + tokenizer.text_ids(message.content)


def _message_ids(tokenizer: TextTokenizer, message: Message) -> list[int]:
    return [tokenizer.get_command(f"<|{message.role}|>"), *_body_ids(tokenizer, message)]


def _end_id(tokenizer: TextTokenizer, answer: Message) -> int:
    # Metadata names a tool: the model then hands over to it, and the tool's result opens with
    # <|observation|>.
    return tokenizer.get_command("<|observation|>") if answer.metadata else tokenizer.end_id
