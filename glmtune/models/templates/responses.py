"""What the released `chat` makes of decoded output: pure functions, one set of rules per generation.

Folders in transformers' format have no such rules of their own: their answers are stripped, thoughts are kept
apart, and calls of tools are read as GLM-4 writes them where tools were announced.

A history that is handed back holds cleaned answers, and the models saw such histories; so the clean-ups are
part of the prompt, and each is the release's, oddities included.

Source:
    ``process_response`` in ``modeling_chatglm.py`` of THUDM/chatglm-6b, chatglm2-6b, chatglm3-6b and
    glm-4-9b-chat.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.thinking import has_thoughts, split_thoughts

ASSISTANT = "<|assistant|>"
"""What separates messages of ChatGLM3 and GLM-4 in decoded output."""
YEAR_PLACEHOLDER, YEAR = "[[训练时间]]", "2023年"
CALL_NAME = re.compile(r"[\w.\-]{1,64}")
"""What the name of a tool may be, on the line in front of its arguments."""
MAX_CALL_CHARS = 100_000
"""Longest tool call that is read as Python: a parsed text takes a thousand times its size in memory."""
# The release replaces an ASCII mark that touches a Chinese character on either side, so "3:4" keeps its
# colon.
_FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
_NEXT_TO_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


@dataclass(frozen=True, slots=True)
class Response:
    """An answer as `chat` returns it.

    Attributes:
        content: the text to show; for a tool call ``{"name": ..., "parameters": {...}}`` where tools were
            announced and the call can be read, else ``{"name": ..., "content": ...}``.
        messages: what the model wrote, for the history; several where it went on by itself (ChatGLM3, GLM-4).
        thoughts: what it thought before it, which is no part of ``content`` and ``messages``.
    """

    content: str | dict[str, Any]
    messages: tuple[Message, ...]
    thoughts: str = ""


def process_response(family: Family, text: str, *, tools_announced: bool = False) -> Response:
    """Turn decoded output into the answer to show and the messages to remember.

    Args:
        family: the release.
        text: decoded output behind the prompt, without the id that ended it; where the prompt opens thoughts,
            with the opening tag in front (`Template.answer_opening`).
        tools_announced: the conversation's system message announced tools.

    Returns:
        The answer; a tool call is read as data and never executed.
    """
    if family in _TEXT_RULES:
        content = _TEXT_RULES[family](text)
        return Response(content, (Message("assistant", content),))
    if family is Family.TRANSFORMERS:
        return _folder_response(text, tools_announced=tools_announced)
    messages = split_messages(text)
    last = messages[-1]
    if not last.metadata:
        return Response(fill_in_year(last.content), messages)
    read = read_json_parameters if family == Family.GLM4 else read_python_parameters
    parameters = read(last.content) if tools_announced else None
    if parameters is None:
        return Response({"name": last.metadata, "content": last.content}, messages)
    return Response({"name": last.metadata, "parameters": dict(parameters)}, messages)


def _folder_response(text: str, *, tools_announced: bool) -> Response:
    first, *others = text.split(ASSISTANT)
    thoughts, answer = split_thoughts(first)
    # Behind thoughts an answer begins on a new line, so there the first line says nothing.
    messages = [_folder_message(answer if has_thoughts(first) else first, tools_announced)]
    messages += [_folder_message(part, tools_announced) for part in others]
    last = messages[-1]
    if not last.metadata:
        return Response(last.content, tuple(messages), thoughts)
    parameters = read_json_parameters(last.content)
    read = {"content": last.content} if parameters is None else {"parameters": dict(parameters)}
    return Response({"name": last.metadata} | read, tuple(messages), thoughts)


def _folder_message(text: str, tools_announced: bool) -> Message:
    """Return a message of a folder's model: a call where one was possible and looks like it, else text."""
    name, line_break, content = text.partition("\n")
    is_call = tools_announced and line_break and CALL_NAME.fullmatch(name.strip())
    if is_call and content.lstrip().startswith("{"):
        return Message("assistant", content.strip(), name.strip())
    return Message("assistant", text.strip())


def fill_in_year(text: str) -> str:
    """Put the year that the releases write for the placeholder in their training data."""
    return text.replace(YEAR_PLACEHOLDER, YEAR)


def widen_marks(text: str) -> str:
    """Make marks that touch a Chinese character full-width."""
    return _NEXT_TO_CHINESE.sub(lambda match: match[0].translate(_FULL_WIDTH), text)


def is_chinese(character: str) -> bool:
    """Whether a character (or none) is one of those next to which marks are full-width."""
    return "\u4e00" <= character <= "\u9fff"


def clean_chatglm(text: str) -> str:
    """Clean an answer of ChatGLM-6B: stripped, and full-width punctuation next to Chinese characters.

    >>> clean_chatglm(" 你好,world! ")
    '你好，world!'
    """
    return widen_marks(clean_chatglm2(text))


def clean_chatglm2(text: str) -> str:
    """Clean an answer of ChatGLM2: stripped, with the year filled in."""
    return fill_in_year(text.strip())


def keep_text(text: str) -> str:
    """Leave an answer of CodeGeeX2 as it is; leading blanks matter in code."""
    return text


def split_messages(text: str) -> tuple[Message, ...]:
    """Split output of ChatGLM3 or GLM-4 into messages; the first line of each is its metadata.

    Args:
        text: decoded output, from behind the prompt's ``<|assistant|>`` on.

    Returns:
        One message per ``<|assistant|>`` in between. Plain answers are stripped; a tool call loses only
        the blank that decoding puts in front, so that encoding it again gives the ids generated.
    """
    messages: list[Message] = []
    for part in text.split(ASSISTANT):
        metadata, line_break, content = part.partition("\n")
        if not line_break:
            metadata, content = "", part
        metadata = metadata.strip()
        messages.append(
            Message("assistant", content.removeprefix(" ") if metadata else content.strip(), metadata)
        )
    return tuple(messages)


def read_json_parameters(content: str) -> Mapping[str, Any] | None:
    """Read the parameters of a GLM-4 tool call, a JSON object; None if it is none (code, for instance).

    >>> read_json_parameters('{"city": "Beijing"}')
    {'city': 'Beijing'}
    """
    try:
        parameters = json.loads(content)
    except (ValueError, RecursionError):  # brackets nested by the thousand are no call
        return None
    return parameters if isinstance(parameters, dict) else None


def read_python_parameters(content: str) -> Mapping[str, Any] | None:
    r"""Read the parameters of a ChatGLM3 tool call: literals by name in one call, in a fenced block.

    >>> read_python_parameters("```python\ntool_call(city='Beijing', days=3)\n```")
    {'city': 'Beijing', 'days': 3}
    """
    # The release evaluates this text as Python, with `tool_call` returning its arguments. Here it is parsed
    # and only literals are read, so that nothing a model writes is ever executed.
    code = "\n".join(content.strip().split("\n")[1:-1])
    if len(code) > MAX_CALL_CHARS:
        return None
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments: dict[str, Any] = {}
        for word in call.keywords:
            value = ast.literal_eval(word.value)
            # `**{...}` has no name of its own: arguments whose names are no words of Python.
            arguments |= {word.arg: value} if word.arg else value
        return arguments
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None  # what `ast` raises for text that is no such call, absurdly deep text included


_TEXT_RULES: dict[Family, Callable[[str], str]] = {
    Family.CHATGLM: clean_chatglm,
    Family.CHATGLM2: clean_chatglm2,
    Family.CHATGLM2_32K: clean_chatglm2,
    Family.CODEGEEX2: keep_text,
}
"""Families whose answers are one text; the others write messages, possibly with a tool's name."""
