"""Where training of glm-tiny starts: its tokenizer and its architecture in ChatGLM2's config.json.

``python -m glmtune.tiny.start FOLDER`` writes both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from glmtune.tiny.tokenizer import train_tokenizer

COMMAND_TOKENS = 5
VOCABULARY_MULTIPLE = 64
MODEL_FILE = "modeling_chatglm.ChatGLMForConditionalGeneration"
ARCHITECTURE: dict[str, object] = {
    "_name_or_path": "glm-tiny",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": MODEL_FILE,
        "AutoModelForCausalLM": MODEL_FILE,
        "AutoModelForSeq2SeqLM": MODEL_FILE,
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 512,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 192,
    "kv_channels": 32,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 3,
    "num_attention_heads": 6,
    "num_layers": 6,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 1024,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "glmtune_family": "chatglm2",
}


def write_start(folder: Path) -> None:
    """Write ``tokenizer.model``, ``tokenizer_config.json`` and ``config.json``.

    Args:
        folder: where to write; made if absent.
    """
    num_tokens = train_tokenizer(folder) + COMMAND_TOKENS
    padded = -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config = {**ARCHITECTURE, "padded_vocab_size": padded}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_start(Path(sys.argv[1]))
