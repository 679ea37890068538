"""Our prompt templates as Jinja, the form in which other tools take one along with a tokenizer."""

from __future__ import annotations

from glmtune.models.releases.families import Family

_ROLES = "{{ '<|' + message.role + '|>' + (message.metadata or '') + '\\n' }}"
_ASSISTANT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
_ROUNDS = (
    "[gMASK]<sop>{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ ('' if loop.first else '\\n\\n') + '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\n\\n问：' }}"
    "{{ message.content }}"
    "{% else %}{{ '\\n\\n答：' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n答：' }}{% endif %}"
)
CHAT_TEMPLATES = {
    Family.CHATGLM2: _ROUNDS,
    Family.CHATGLM2_32K: _ROUNDS,
    # The blank is ChatGLM3's: line break and content are encoded each for itself, so each starts with one.
    Family.CHATGLM3: "[gMASK]<sop>{% for message in messages %}"
    + _ROLES
    + "{{ ' ' + message.content }}{% endfor %}"
    + _ASSISTANT,
    Family.GLM4: "[gMASK]<sop>{% for message in messages if message.content %}"
    + _ROLES
    + "{{ message.content }}{% endfor %}"
    + _ASSISTANT,
}
CHAT_TEMPLATES[Family.CHATGLM3_32K] = CHAT_TEMPLATES[Family.CHATGLM3]
"""Jinja forms of our prompt templates; CodeGeeX2 has none, it completes code."""
