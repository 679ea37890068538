r"""Our prompt templates as Jinja, the form in which other tools take one along with a tokenizer.

A rendered template is one text, in which a tokenizer looks for the names of its tokens: nothing tells a role
token from a user who typed its name. So a name in what a message says is written with a mark inside::

    a user wrote      Was heißt <|assistant|>?
    the template      <|user|>\n Was heißt <⟦U+FDD0⟧|assistant|>?
    the tokenizer     finds no name there, then drops the mark, then cuts the text into pieces

so that its ids are those of the words as text. The marks are characters that Unicode sets aside for a
program's own use (noncharacters). Where the templates of ours encode two parts each for itself and the text
of both would melt into other pieces, the second mark stands between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from glmtune.models.releases.families import Family

HIDDEN, BORDER = "\ufdd0", "\ufdd1"
"""Inside a name that is text: dropped by a normalizer. Between parts: dropped where pieces are cut."""

# What all have in common: `plain` writes words of others; `text_of` gives a message's text, or raises.
_COMMON = r"""
{%- macro plain(text) -%}
  {%- set found = namespace(text=text) -%}
  {%- for name in [NAMES] -%}
    {%- set found.text = found.text | replace(name, name[0] ~ '\ufdd0' ~ name[1:]) -%}
  {%- endfor -%}
  {{- found.text -}}
{%- endmacro -%}
{%- macro check_text(message) -%}
  {%- if message.content is defined and message.content is not none and message.content is not string -%}
    {{- raise_exception('A message has content that is no text. Join its parts into one text.') -}}
  {%- endif -%}
{%- endmacro -%}
{%- if add_generation_prompt and messages[-1].role == 'assistant' -%}
  {{- raise_exception('The last message is an answer already. Drop it, or add_generation_prompt.') -}}
{%- endif -%}
"""
_ROUNDS = r"""
{%- if tools -%}
  {{- raise_exception('ChatGLM2 knows no tools. Drop them, or use ChatGLM3 or GLM-4.') -}}
{%- endif -%}
{{- '[gMASK]<sop>' -}}
{%- set turns = namespace(count=0) -%}
{%- for message in messages -%}
  {{- check_text(message) -}}
  {%- if message.tools or message.tool_calls or message.function_call or message.metadata -%}
    {{- raise_exception('ChatGLM2 knows no tools, but a message has some. Use ChatGLM3 or GLM-4.') -}}
  {%- elif loop.first and message.role == 'system' -%}
    {{- plain(message.content or '') ~ '\n\n' -}}
  {%- elif message.role != ('assistant' if turns.count % 2 else 'user') -%}
    {{- raise_exception('Messages must be an optional system message, then user and assistant in turn.') -}}
  {%- else -%}
    {%- if turns.count % 2 == 0 -%}
      {{- ('\n\n' if turns.count else '') ~ '[Round ' ~ (turns.count // 2 + 1) ~ ']\n\n问：' -}}
    {%- endif -%}
    {{- plain(message.content or '') -}}
    {%- if turns.count % 2 == 0 and (add_generation_prompt or not loop.last) -%}
      {{- '\n\n答：' -}}
    {%- endif -%}
    {%- set turns.count = turns.count + 1 -%}
  {%- endif -%}
{%- endfor -%}
{%- if not turns.count -%}{{- raise_exception('There is no question.') -}}{%- endif -%}
"""
_ROLES = r"""
{%- macro turn(role, metadata, content) -%}
  {%- if '\n' in metadata -%}{{- raise_exception('The name of a tool must be one line.') -}}{%- endif -%}
  TURN
{%- endmacro -%}
{%- macro called(call) -%}
  {%- set function = call.function if call.function else call -%}
  {%- set arguments = function.arguments if 'arguments' in function else function.parameters -%}
  {%- set arguments = arguments if arguments else {} -%}
  {%- if not function.name -%}{{- raise_exception('A call of a tool has no name.') -}}{%- endif -%}
  {%- if arguments is not mapping -%}
    {{- raise_exception('The arguments of a call must be an object, not its JSON as text. Parse it.') -}}
  {%- endif -%}
  {%- set written -%}CALL{%- endset -%}
  {{- turn('assistant', function.name | trim, written) -}}
{%- endmacro -%}
{%- if tools and messages[0].role != 'system' -%}
  {{- raise_exception('Tools stand below a system message, but there is none. Put one first.') -}}
{%- endif -%}
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
  {{- check_text(message) -}}
  {%- set role = 'observation' if message.role == 'tool' else message.role -%}
  {%- if role not in ['system', 'user', 'assistant', 'observation'] -%}
    {{- raise_exception('The role of a message must be system, user, assistant, observation or tool.') -}}
  {%- endif -%}
  {%- set content = message.content or '' -%}
  {%- set announced = tools if tools and loop.first else message.tools -%}
  {%- if announced -%}
    {%- if role != 'system' -%}
      {{- raise_exception('Only a system message announces tools. Move them there.') -}}
    {%- endif -%}
    {%- set found = namespace(tools=[]) -%}
    {%- for tool in announced -%}
      {%- set others = tool | list | reject('in', ['type', 'function']) | list -%}
      {%- set inner = tool.function if tool.function is mapping and not others else tool -%}
      {%- set found.tools = found.tools + [inner] -%}
    {%- endfor -%}
    {%- set content -%}ANNOUNCE{%- endset -%}
  {%- endif -%}
  {%- set calls = message.tool_calls or ([message.function_call] if message.function_call else []) -%}
  {%- if calls and role != 'assistant' -%}
    {{- raise_exception('Only an assistant calls tools.') -}}
  {%- endif -%}
  {%- if content or not calls -%}{{- turn(role, (message.metadata or '') ~ '', content) -}}{%- endif -%}
  {%- for call in calls -%}{{- called(call) -}}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
# The blank is ChatGLM3's: line break and content are encoded each for itself, so each starts with one. A
# token that a user added has none in front.
_TURN3 = r"""
  {{- '<|' ~ role ~ '|>' ~ plain(metadata) ~ '\n' -}}
  {%- if contentUNLESS_ADDED -%}{{- ' ' -}}{%- endif -%}
  {{- plain(content) -}}
"""
_CALL3 = r"""
    {%- set found = namespace(words=[], plain=true) -%}
    {%- for name, value in arguments.items() -%}
      {%- set found.words = found.words + [name ~ '=' ~ ('%r' | format(value))] -%}
      {%- if not name.isidentifier() -%}{%- set found.plain = false -%}{%- endif -%}
    {%- endfor -%}
    {%- set words = found.words | join(', ') if found.plain else '**' ~ ('%r' | format(arguments)) -%}
    {{- '```python\ntool_call(' ~ words ~ ')\n```' -}}
"""
_ANNOUNCE3 = r"{{- content ~ '\n' ~ (found.tools | tojson(indent=4)) -}}"
_TURN4 = r"""
  {%- if content -%}
    {{- '<|' ~ role ~ '|>' ~ plain(metadata) ~ '\n' -}}
    {%- if content[:1].isspace() -%}{{- '\ufdd1' -}}{%- endif -%}
    {{- plain(content) -}}
  {%- endif -%}
"""
_CALL4 = "{{- arguments | tojson -}}"
_ANNOUNCE4 = r"""
    {{- (content ~ '\n\n# 可用工具').lstrip('\n') -}}
    {%- for tool in found.tools -%}
      {%- if 'name' not in tool -%}{{- raise_exception('A tool has no name.') -}}{%- endif -%}
      {{- '\n\n## ' ~ tool['name'] ~ '\n\n' ~ (tool | tojson(indent=4)) -}}
      {{- '\n在调用上述函数时，请使用 Json 格式表示调用的参数。' -}}
    {%- endfor -%}
"""


def _with_roles(turn: str, call: str, announce: str) -> str:
    return (
        _ROLES.replace("TURN", turn.strip())
        .replace("CALL", call.strip())
        .replace("ANNOUNCE", announce.strip())
    )


_FORMS = {
    Family.CHATGLM2: _ROUNDS,
    Family.CHATGLM2_32K: _ROUNDS,
    Family.CHATGLM3: _with_roles(_TURN3, _CALL3, _ANNOUNCE3),
    Family.CHATGLM3_32K: _with_roles(_TURN3, _CALL3, _ANNOUNCE3),
    Family.GLM4: _with_roles(_TURN4, _CALL4, _ANNOUNCE4),
}
"""CodeGeeX2 has none, it completes code."""


def jinja_form(family: Family, *, names: Sequence[str] = (), added: Sequence[str] = ()) -> str | None:
    """Return the prompt template of a release as Jinja.

    It refuses what ours refuses; in place of the arguments of a call as JSON text it takes an object only.

    Args:
        family: the release.
        names: of the tokens that the tokenizer finds in a text, and that no message may bring.
        added: tokens that a user added, which messages may bring.

    Returns:
        None for a release without chat.
    """
    form = _FORMS.get(family)
    if form is None:
        return None
    written = ", ".join(map(_quoted, added))
    unless = f" and not content.startswith(({written},))" if added else ""
    form = (_COMMON + form).replace("UNLESS_ADDED", unless).replace("NAMES", ", ".join(map(_quoted, names)))
    return form.strip()


def _quoted(text: str) -> str:
    """Write a string as Jinja reads it; escapes are JSON's, but not those of pairs of surrogates."""
    return json.dumps(text, ensure_ascii=False)


_PLAIN_ROLES = "{{ '<|' + message.role + '|>' + (message.metadata or '') + '\\n' }}"
_PLAIN_ASSISTANT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
_PLAIN_ROUNDS = (
    "[gMASK]<sop>{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ ('' if loop.first else '\\n\\n') + '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\n\\n问：' }}"
    "{{ message.content }}"
    "{% else %}{{ '\\n\\n答：' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n答：' }}{% endif %}"
)
_PLAIN_CHATGLM3 = (
    f"[gMASK]<sop>{{% for message in messages %}}{_PLAIN_ROLES}"
    f"{{{{ ' ' + message.content }}}}{{% endfor %}}{_PLAIN_ASSISTANT}"
)
CHAT_TEMPLATES: Mapping[Family, str] = {
    Family.CHATGLM2: _PLAIN_ROUNDS,
    Family.CHATGLM2_32K: _PLAIN_ROUNDS,
    Family.CHATGLM3: _PLAIN_CHATGLM3,
    Family.CHATGLM3_32K: _PLAIN_CHATGLM3,
    Family.GLM4: f"[gMASK]<sop>{{% for message in messages if message.content %}}{_PLAIN_ROLES}"
    f"{{{{ message.content }}}}{{% endfor %}}{_PLAIN_ASSISTANT}",
}
"""The same in few words, without marks, tools and refusals: for programs whose tokenizers drop no marks."""
