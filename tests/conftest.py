"""Fixtures shared by all tests."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GLMTUNE_SHARED", REPO.parent / "shared"))


SLOWEST = (
    "contract/test_readme.py",
    "contract/test_gpu_check.py",
    "contract/test_notebooks.py",
)
"""Files of tests that take longest, the longest first: one that begins last would leave all cores but one idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files; whole files go to one process each, in this order."""
    places = {REPO / "tests" / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def shared_folder(name: str) -> Path:
    """Return a folder of the development data, or skip the test with the reason."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"development data is absent: {name} (set GLMTUNE_SHARED to its folder)")
    return folder


def slow_except(some: Collection[Any], cells: Iterable[Any]) -> list[Any]:
    """Return the cells of a matrix for `parametrize`; those not in ``some`` are marked slow."""
    found = list(cells)
    assert set(some) <= set(found)
    values = [cell if isinstance(cell, tuple) else (cell,) for cell in found]
    marks = [() if cell in some else (pytest.mark.slow,) for cell in found]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]


@pytest.fixture(scope="session")
def slow_too(request: pytest.FixtureRequest) -> bool:
    """Whether slow tests were asked for: a fixture that prepares many tests at once then prepares theirs, too."""
    return any(item.get_closest_marker("slow") for item in request.session.items)


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the environment's own object back: `datasets` leaves a copy when it maps in several processes."""
    monkeypatch.setattr(os, "environ", os.environ)


@pytest.fixture(autouse=True)
def own_cache_of_rows(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep encoded rows of tests out of the user's cache, and the user's rows out of tests."""
    monkeypatch.setattr(
        "glmtune.data.encoded.cache.cache_folder", lambda: tmp_path_factory.getbasetemp() / "cache"
    )


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Golden cases of the released code."""
    return shared_folder("oracles")


@pytest.fixture(scope="session")
def released_tokenizers() -> Path:
    """Released tokenizer files."""
    return shared_folder("tokenizers")


@pytest.fixture(scope="session")
def benchmarks_data() -> Path:
    """Benchmarks and ADGEN in their official layouts."""
    return shared_folder("benchmarks")


TINY_SENTENCES = (
    "你好，今天想去哪里？",
    "这条裙子颜色很白，面料柔软，穿着舒服。",
    "类型#裙*颜色#白*面料#棉，写一段广告。",
    "小明有3个苹果，又买了5个，一共有8个。",
    "晚上睡不着怎么办？少喝咖啡，早点休息。",
    "问：下面哪一个是水果？答：苹果。",
    "The shop sells shirts, dresses and coats in many colours.",
    "How many apples are left? There are 12 - 7 = 5 apples left.",
    "Write a short text about a warm red coat for the winter.",
    "[Round 1]  0123456789 + - * / = ( ) # : ; ! ? % _",
)


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sentencepiece file of 512 pieces in the form of ChatGLM2's, trained on our sentences."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_SENTENCES * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"name_or_path": "THUDM/chatglm2-6b", "tokenizer_class": "ChatGLMTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_folder: Path):
    """A ChatGLM2 tokenizer of a few hundred pieces; session-wide, so do not change it."""
    from glmtune.models.releases.families import Family
    from glmtune.models.tokenizers.load import load_tokenizer_folder

    return load_tokenizer_folder(tiny_tokenizer_folder, Family.CHATGLM2)


@pytest.fixture(scope="session")
def tiny_chatglm3_tokenizer(tiny_tokenizer_folder: Path):
    """The same pieces under the rules of ChatGLM3; session-wide, so do not change it."""
    from glmtune.models.releases.families import Family
    from glmtune.models.tokenizers.load import load_tokenizer_folder

    return load_tokenizer_folder(tiny_tokenizer_folder, Family.CHATGLM3)


@pytest.fixture(scope="session")
def tiny_base(tiny_tokenizer_folder: Path, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete official-format ChatGLM2 checkpoint: random weights (2 layers, width 32), the tiny tokenizer."""
    import shutil

    import torch

    from glmtune.models.checkpoints.config import native_config
    from glmtune.models.later import OfficialGlmForCausalLM
    from glmtune.models.releases.families import Family

    folder = tmp_path_factory.mktemp("tiny_base") / "chatglm2-tiny"
    shutil.copytree(tiny_tokenizer_folder, folder)
    official = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "kv_channels": 8,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "padded_vocab_size": (len(tiny_tokenizer) + 63) // 64 * 64,
        "seq_length": 256,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "eos_token_id": tiny_tokenizer.eos_token_id,
        "pad_token_id": tiny_tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }
    torch.manual_seed(0)
    OfficialGlmForCausalLM(native_config(official, Family.CHATGLM2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Attribute-to-sentence rows in the ADGEN layout: `train` (40 rows) and `validation` (8), of several lengths."""
    folder = tmp_path_factory.mktemp("tiny_rows")
    rows = [
        {
            "content": f"类型#裙*颜色#{color}*面料#{cloth}",
            "summary": f"这条裙子颜色很{color}，面料{cloth}，" + "穿着舒服。" * times,
        }
        for color in "白红黑绿"
        for cloth in ("棉", "丝", "柔软", "毛")
        for times in (1, 2, 4)
    ]
    files = {}
    for name, chosen in (("train", rows[:40]), ("validation", rows[40:])):
        files[name] = folder / f"{name}.json"
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in chosen)
        files[name].write_text(text, encoding="utf-8")
    return files
