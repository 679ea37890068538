"""The releases' prompts as the Jinja that llama.cpp knows.

Not those of our exports for transformers: llama.cpp's own Jinja is smaller (it has no ``//``, and stops at
a template that has one), and its tokenizer drops no marks by which a user's words could be told from names of
tokens.
"""

from __future__ import annotations

from glmtune.models.releases.families import Family

# In two parts: without `--jinja` llama.cpp looks for these words, and takes prompts of its own where they are
# (those of another release); so it says that it does not know the template.
_START = "{{ '[gMASK]' + '<sop>' }}"
_ROUNDS = (
    _START + "{% set turn = namespace(number=0) %}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'user' %}{% set turn.number = turn.number + 1 %}"
    "{{ ('' if turn.number == 1 else '\\n\\n') + '[Round ' ~ turn.number ~ ']\\n\\n问：' + message.content }}"
    "{% else %}{{ '\\n\\n答：' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n答：' }}{% endif %}"
)
_ROLE = (
    "{{ '<|' + ('observation' if message.role == 'tool' else message.role) + '|>' + (message.metadata or '') "
    "+ '\\n' }}"
)
_ASSISTANT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
# The blank is ChatGLM3's: line break and content are encoded each for itself, so each starts with one.
_CHATGLM3 = (
    _START
    + "{% for message in messages %}"
    + _ROLE
    + "{{ ' ' + message.content if message.content else '' }}{% endfor %}"
    + _ASSISTANT
)
_GLM4 = (
    _START
    + "{% for message in messages %}{% if message.content %}"
    + _ROLE
    + "{{ message.content }}{% endif %}{% endfor %}"
    + _ASSISTANT
)
PROMPTS = {
    Family.CHATGLM2: _ROUNDS,
    Family.CHATGLM2_32K: _ROUNDS,
    Family.CHATGLM3: _CHATGLM3,
    Family.CHATGLM3_32K: _CHATGLM3,
    Family.GLM4: _GLM4,
}
"""CodeGeeX2 has none, it completes code."""
