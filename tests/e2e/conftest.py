"""Complete tiny checkpoints of every generation: random weights, and tokenizers in the form of the releases."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import build_model
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder
from tests.conftest import TINY_SENTENCES
from tests.models.transformers_folders import make_folder

MakeBase = Callable[[Family, str], Path]


def write_unigram_file(folder: Path) -> None:
    """Write ``ice_text.model`` in the form of ChatGLM-6B's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_SENTENCES * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=1.0,
        control_symbols=["<pad>"],
        user_defined_symbols=["<n>"],
        num_threads=1,
        minloglevel=2,
    )
    (folder / "ice_text.model").write_bytes(model.getvalue())


def write_rank_file(folder: Path) -> None:
    """Write ``tokenizer.model`` in the form of GLM-4's: every byte, and the characters of our sentences."""
    pieces = [bytes([value]) for value in range(256)]
    for character in sorted(set("".join(TINY_SENTENCES))):
        encoded = character.encode()
        pieces += [encoded[:length] for length in range(2, len(encoded) + 1)]
    ranks = dict.fromkeys(pieces)
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(ranks)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")


def official_config(family: Family, tokenizer: Any, dtype: str) -> dict[str, Any]:
    """Sizes of a model of 2 layers and width 32 under the official keys of its generation."""
    sizes = {"model_type": "chatglm", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
    sizes |= {"layernorm_epsilon": 1e-5, "torch_dtype": dtype, "pad_token_id": tokenizer.pad_token_id}
    rows = (max(len(tokenizer), tokenizer.vocab_size) + 63) // 64 * 64
    if family is Family.CHATGLM:
        names = {"mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}
        names |= {"bos_token_id": "<sop>", "eos_token_id": "<eop>"}
        tokens = {key: tokenizer.get_command(name) for key, name in names.items()}
        return sizes | tokens | {"vocab_size": rows, "inner_hidden_size": 48, "max_sequence_length": 256}
    sizes |= {"padded_vocab_size": rows, "ffn_hidden_size": 48, "kv_channels": 8, "seq_length": 256}
    sizes |= {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True}
    if family is Family.GLM4:
        stops = [tokenizer.get_command(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
        return sizes | {"eos_token_id": stops, "rope_ratio": 500}
    ratio = {Family.CHATGLM2_32K: 16, Family.CHATGLM3_32K: 50}.get(family, 1)
    return sizes | {"eos_token_id": tokenizer.eos_token_id, "rope_ratio": ratio}


@pytest.fixture(scope="session")
def make_base(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Make (once) the checkpoint of a family whose weights are stored in a dtype; return its folder."""
    made: dict[tuple[Family, str], Path] = {}

    def make(family: Family, dtype: str) -> Path:
        if (family, dtype) in made:
            return made[family, dtype]
        folder = tmp_path_factory.mktemp("bases") / f"{family}-{dtype}"
        if family is Family.TRANSFORMERS:
            made[family, dtype] = make_folder(folder, "glm4", dtype=dtype)
            return folder
        folder.mkdir()
        if family is Family.CHATGLM:
            write_unigram_file(folder)
        elif family is Family.GLM4:
            write_rank_file(folder)
        else:
            shutil.copy(tiny_tokenizer_folder / "tokenizer.model", folder)
        tokenizer = load_tokenizer_folder(folder, family)
        torch.manual_seed(0)
        model = build_model(native_config(official_config(family, tokenizer, dtype), family))
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))
        made[family, dtype] = folder
        return folder

    return make


@pytest.fixture(scope="session")
def question_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions with answers of several lengths, one with a line break."""
    questions = ["晚上睡不着怎么办？", "还剩几个苹果？", "Which fruit?", "写一段广告。"]
    answers = ["少喝咖啡。", "还有5个苹果。\n一共8个。", "An apple.", "这条裙子颜色很白，面料柔软。"]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": q, "response": a} for q, a in zip(questions, answers, strict=True)]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file
