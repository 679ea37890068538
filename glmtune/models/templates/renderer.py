"""Which template belongs to which release, and `render_prompt`.

How a conversation becomes the text and the ids a GLM was trained on is decided here alone: training,
prediction, evaluation, chat and export take their prompts from these templates, so a tuned model meets the
prompts it was tuned on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmtune.errors import ConfigError, unknown_name
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.base import Template, TextTokenizer
from glmtune.models.templates.folder import folder_template
from glmtune.models.templates.roles import ChatGLM3Template, GLM4Template, system_with_tools
from glmtune.models.templates.rounds import ChatGLM2Template, ChatGLMTemplate, CodeGeeX2Template

__all__ = [
    "TEMPLATES",
    "ChatGLM2Template",
    "ChatGLM3Template",
    "ChatGLMTemplate",
    "CodeGeeX2Template",
    "GLM4Template",
    "Template",
    "TextTokenizer",
    "render_prompt",
    "system_with_tools",
    "template_for",
]

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        ChatGLMTemplate(),
        ChatGLM2Template(),
        CodeGeeX2Template(),
        ChatGLM3Template(),
        GLM4Template(),
    )
}

_TEMPLATE_NAMES: dict[Family, str] = {
    Family.CHATGLM: "chatglm",
    Family.CHATGLM2: "chatglm2",
    Family.CHATGLM2_32K: "chatglm2",
    Family.CODEGEEX2: "codegeex2",
    Family.CHATGLM3: "chatglm3",
    Family.CHATGLM3_32K: "chatglm3",
    Family.GLM4: "glm4",
}


def template_for(tokenizer_or_family: TextTokenizer | Family | str) -> Template:
    """Return the template of a release.

    Args:
        tokenizer_or_family: a tokenizer of ours, a family, or its value such as ``"chatglm2-32k"``. Of a
            folder in transformers' format only the tokenizer brings the template along.

    Raises:
        ConfigError: no such family.
    """
    asked = tokenizer_or_family
    value = asked if isinstance(asked, str) else asked.family
    if value == Family.TRANSFORMERS:
        return folder_template(None) if isinstance(asked, str) else _folder_template(asked)
    if value not in _TEMPLATE_NAMES:
        raise ConfigError(unknown_name("The family of the prompt template", value, _TEMPLATE_NAMES))
    return TEMPLATES[_TEMPLATE_NAMES[Family(value)]]


def _folder_template(tokenizer: Any) -> Template:
    """Return the template that a folder's tokenizer brings along; of several, the one called default."""
    source: Any = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):
        source = source.get("default")
    named: dict[str, Any] = tokenizer.special_tokens_map
    usual = tuple((name, token) for name, token in named.items() if isinstance(token, str))
    return folder_template(source, tuple(tokenizer.command_names), usual)


def render_prompt(
    query: str,
    history: Sequence[tuple[str, str] | Message] = (),
    *,
    system: str | None = None,
    template: str = "chatglm2",
) -> str:
    r"""Return the prompt for a question as text.

    Args:
        query: the question to answer.
        history: earlier turns, oldest first: pairs of question and answer, or messages.
        system: text of a system message, if any.
        template: a name of ``TEMPLATES``.

    Raises:
        ConfigError: there is no such template.
        DataError: the turns do not fit the template.

    >>> render_prompt("How are you?", [("Hi", "Hello!")])
    '[Round 1]\n\n问：Hi\n\n答：Hello!\n\n[Round 2]\n\n问：How are you?\n\n答：'
    """
    if template not in TEMPLATES:
        raise ConfigError(unknown_name("The prompt template", template, TEMPLATES))
    messages = [Message("system", system)] if system is not None else []
    for turn in history:
        if isinstance(turn, Message):
            messages.append(turn)
        else:
            question, answer = turn
            messages += [Message("user", question), Message("assistant", answer)]
    return TEMPLATES[template].render([*messages, Message("user", query)])
