"""Tiny checkpoints in transformers' own format, written by transformers itself, as people hold them today.

Tokenizers are byte-level BPE with GLM-4's special tokens; the chat templates are ours, in the forms that the
releases have: role tokens (GLM-4), a line break in the prompt (GLM-Edge), thoughts (GLM-Z1).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from glmtune.models.tokenizers.glm4 import WORDS, ChatGLM4Tokenizer

_TOOLS = (
    "{% if tools %}<|system|>\nTools:{% for tool in tools %}\n{{ tool.name }}: {{ tool.description }}"
    "{% endfor %}{% endif %}"
)
_MESSAGE = "<|{{ message.role }}|>{{ message.metadata or '' }}\n{{ message.content }}"
_THOUGHTLESS = "<|{{ message.role }}|>\n{{ message.content.split('</think>')[-1].strip() }}"
TEMPLATES = {
    "roles": f"[gMASK]<sop>{_TOOLS}{{% for message in messages %}}{_MESSAGE}{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "edge": f"{{% for message in messages %}}{_MESSAGE}{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "thinking": f"[gMASK]<sop>{_TOOLS}{{% for message in messages %}}{_THOUGHTLESS}{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}",
}
KINDS = {
    "glm": (GlmConfig, GlmForCausalLM, "roles", False),
    "glm-edge": (GlmConfig, GlmForCausalLM, "edge", True),
    "glm4": (Glm4Config, Glm4ForCausalLM, "roles", False),
    "glm-z1": (Glm4Config, Glm4ForCausalLM, "thinking", False),
}
"""Kind → configuration, model, chat template, whether the head is tied to the embedding."""


@lru_cache
def byte_level_tokenizer() -> Tokenizer:
    """Train a small vocabulary, with GLM-4's rules and special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    texts = [
        "你好，今天去哪里？我们去公园散步。",
        "How many legs does a cat have? Four legs.",
        "x = 1\n\n\ny = 22\n",
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    names = ChatGLM4Tokenizer.COMMANDS
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    front = [(name, backend.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
    backend.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=front)
    return backend


def fast_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Return transformers' tokenizer of the small vocabulary, with a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level_tokenizer().to_str()),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=template,
    )


def make_folder(folder: Path, kind: str, *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Path:
    """Write a checkpoint of random weights, as transformers does.

    Args:
        folder: created.
        kind: of ``KINDS``.
        seed: of the weights.
        dtype: of the weights.
        **sizes: other values of the configuration.
    """
    config_class, model_class, template, is_tied = KINDS[kind]
    fast = fast_tokenizer(TEMPLATES[template])
    ends = [fast.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    values: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        "eos_token_id": ends,
        "pad_token_id": ends[0],
        "tie_word_embeddings": is_tied,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**values | sizes)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
