"""Tokenizers of folders in transformers' format with chat templates of many forms, all of our own writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder
from tests.models.transformers_folders import TEMPLATES, byte_level_tokenizer

_TALK = (
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.get('metadata', '') }}\n"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORMS = {
    **TEMPLATES,
    # System messages and tools first, whatever their places; OpenAI's form of tools.
    "system-first": "[gMASK]<sop>{% if tools %}<|system|>\n# Tools{% for tool in tools %}\n\n## "
    "{{ tool.function.name }}\n{{ tool.function | tojson(indent=4) }}{% endfor %}{% endif %}"
    "{% for m in messages if m.role == 'system' %}<|system|>\n{{ m.content }}{% endfor %}" + _TALK,
    # Tools stand in the message that announces them.
    "tools-in-message": "[gMASK]<sop>{% for m in messages %}{% if m.tools is defined %}<|system|>"
    "{% for tool in m.tools %}\n{{ tool.function.name }}: {{ tool.function.description }}{% endfor %}"
    "{% endif %}{% if m.content %}<|{{ m.role }}|>{{ m.metadata or '' }}\n{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "stripped": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # Every turn ends with a token, as in many other models.
    "closed": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # An answer is asked for behind everything, also an answer: some releases never look at the variable.
    "always-asks": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>",
    "always-asks-closed": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "<|assistant|>\n",
    "rounds": "[gMASK]<sop>{% for m in messages %}{% if m.role == 'user' %}"
    "[Round {{ loop.index0 // 2 + 1 }}]\n\nQ: {{ m.content }}\n\n{% else %}A: {{ m.content }}\n\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
    # Thoughts of the last answer are shown, those of earlier ones are not, and no prompt opens any.
    "last-thoughts": "[gMASK]<sop>{% for m in messages %}{% set parts = m.content.split('</think>') %}"
    "<|{{ m.role }}|>\n{% if loop.last and m.role == 'assistant' and parts | length > 1 %}"
    "<think>{{ parts[0].split('<think>')[-1].strip() }}</think>\n{% endif %}{{ parts[-1].strip() }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # Thoughts are never shown, and no prompt opens any.
    "no-thoughts": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content.split('</think>')[-1] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # A model that thinks before it calls tools.
    "thinking-tools": "[gMASK]<sop>{% if tools %}<|system|>{% for tool in tools %}\n{{ tool.function.name }}"
    "{% endfor %}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.metadata or '' }}\n"
    "{{ m.content.split('</think>')[-1].strip() }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}",
    # As exports hide names of special tokens in what a message says.
    "hiding": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content | replace('<|user|>', '<\ufdd0|user|>') }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # The prompt opens thoughts, and later prompts keep them.
    "kept-thoughts": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}",
    "results-of-tools": "[gMASK]<sop>{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n"
    "{{ m.content }}{% elif m.role in ('user', 'assistant', 'system') %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}
REFUSED = {
    "upper case": ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes what messages say"),
    "truncated": ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", "changes what messages say"),
    "blanks inside": (
        "{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}",
        "changes what messages say",
    ),
    "length": (
        "{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}",
        "changes what messages say",
    ),
    "left out": ("{% for m in messages %}<|user|>{% endfor %}", r"does not show all of message 1 \(`user`\)"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
    "unknown": ("{{ messages[0].content.no_such_method() }}", "UndefinedError"),
    "no Jinja": ("{% for m in messages %}", "TemplateSyntaxError"),
    "recursion": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
    "attributes": ("{{ messages.__class__.__mro__ }}", "SecurityError"),
}


def chat_tokenizer(
    folder: Path, template: str | None, backend: Tokenizer | None = None, **settings: Any
) -> Any:
    """Write a tokenizer as transformers does and load it with ours.

    Args:
        folder: created.
        template: Jinja.
        backend: the vocabulary; None takes a small one of bytes with GLM-4's special tokens.
        settings: of transformers' tokenizer.
    """
    backend = backend or byte_level_tokenizer()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()),
        **{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "left", **settings},
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "glm"}), encoding="utf-8")
    return load_tokenizer_folder(folder, Family.TRANSFORMERS)


def theirs(folder: Path) -> PreTrainedTokenizerFast:
    """Load a folder with transformers' own class."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
