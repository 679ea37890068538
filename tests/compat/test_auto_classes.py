"""Auto classes of transformers, after ``import glmtune``, on official folders and on others."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

from glmtune.compat.auto_classes import install, is_official
from glmtune.errors import ConfigError
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.official import OfficialChatGlmForCausalLM

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def with_code(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with code of its own, as official folders have it; running it would leave a file."""
    folder = tmp_path_factory.mktemp("with_code") / "chatglm2-tiny"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    config["auto_map"] = {"AutoConfig": "bad.Config"} | dict.fromkeys(names, "bad.Model")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["auto_map"] = {"AutoTokenizer": ["bad.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "bad.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n", encoding="utf-8")
    return folder


def test_no_code_runs(with_code: Path) -> None:
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        model = auto.from_pretrained(str(with_code), trust_remote_code=True)
        assert isinstance(model, OfficialGlmForCausalLM)
    config = AutoConfig.from_pretrained(with_code, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(with_code, trust_remote_code=True)
    assert type(config).__name__ == "GlmConfig"
    assert type(tokenizer) is type(load_tokenizer(with_code))
    assert not (with_code / "ran").exists()


def test_as_the_readmes_write_it(with_code: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(with_code, trust_remote_code=True)
    model = AutoModel.from_pretrained(with_code, trust_remote_code=True)
    own = model.dtype
    assert model.device.type == "cpu"
    assert own == torch.float32 == model.stored_dtype
    assert model.half().dtype == torch.float16
    model = model.float().eval()
    expected, _ = load_model(with_code, device="cpu").chat(tokenizer, "你好", **GREEDY)
    assert model.chat(tokenizer, "你好", history=[], **GREEDY)[0] == expected


def test_released_forms(oracles: Path) -> None:
    for folder, kind, dtype in (
        ("v1/checkpoint_bin", OfficialChatGlmForCausalLM, torch.float16),
        ("v1/int4", OfficialChatGlmForCausalLM, torch.float16),
        ("glm4/checkpoint_safetensors", OfficialGlmForCausalLM, torch.bfloat16),
    ):
        model = AutoModel.from_pretrained(str(oracles / folder), trust_remote_code=True)
        assert type(model) is kind
        assert model.dtype == dtype, "its own, also on a CPU: what follows casts it once"


def test_a_configuration_goes_in_as_it_came_out(with_code: Path) -> None:
    config = AutoConfig.from_pretrained(with_code, trust_remote_code=True)
    model = AutoModel.from_pretrained(with_code, config=config, trust_remote_code=True)
    assert model.config.num_hidden_layers == config.num_hidden_layers
    config.num_hidden_layers = 1
    with pytest.raises(ConfigError, match=r"`config.num_hidden_layers` is `1`, but the checkpoint has `2`"):
        AutoModel.from_pretrained(with_code, config=config)
    with pytest.raises(
        ConfigError, match=r"`pre_seq_len=128` is not an argument here.*load_model\(source, prefix="
    ):
        AutoConfig.from_pretrained(with_code, pre_seq_len=128, trust_remote_code=True)


def test_what_cannot_be_obeyed(with_code: Path) -> None:
    with pytest.raises(ConfigError, match=r"got 4 without a name"):
        AutoModel.from_pretrained(with_code, 4)
    with pytest.raises(ConfigError, match=r"`padding_side` is given, but the releases pad on the left"):
        AutoTokenizer.from_pretrained(with_code, padding_side="right")
    with pytest.raises(ConfigError, match=r"`quantization_config=.*Write `quantization='int4-g64'`"):
        AutoModel.from_pretrained(with_code, quantization_config={"load_in_4bit": True})


@pytest.mark.parametrize(
    ("source", "official"),
    [
        ("THUDM/chatglm2-6b", True),
        ("zai-org/glm-4-9b-chat", True),
        ("THUDM/chatglm-6b-int4", True),
        ("glm-tiny", True),
        ("THUDM/GLM-4-9B-0414", False),
        ("zai-org/glm-4-9b-chat-hf", False),
        ("zai-org/GLM-4.6", False),
        ("openai-community/gpt2", False),
        (None, False),
    ],
)
def test_which_names_are_releases(source: object, official: bool) -> None:
    assert is_official(source) is official


def test_other_models_are_untouched(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)).save_pretrained(tmp_path)
    assert not is_official(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPT2LMHeadModel
    assert AutoConfig.from_pretrained(tmp_path).model_type == "gpt2"
    (tmp_path / "config.json").write_text("[1", encoding="utf-8")
    assert not is_official(tmp_path), "what cannot be read is transformers' matter"


def test_installing_again_changes_nothing() -> None:
    before, finders = AutoModel.from_pretrained.__func__, len(sys.meta_path)
    install()
    assert AutoModel.from_pretrained.__func__ is before
    assert len(sys.meta_path) == finders


@pytest.mark.parametrize(
    "order", ["import glmtune, transformers", "import transformers.models.auto.modeling_auto, glmtune"]
)
def test_either_may_be_imported_first(order: str, tiny_base: Path) -> None:
    code = (
        f"{order}\nimport sys, transformers\n"
        f"model = transformers.AutoModel.from_pretrained({str(tiny_base)!r}, trust_remote_code=True)\n"
        "print(type(model).__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.strip() == "glmtune.models.later"


def test_importing_glmtune_imports_neither() -> None:
    code = "import sys, glmtune; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_text_generation_pipeline(with_code: Path, caplog: pytest.LogCaptureFixture, recwarn) -> None:
    logging.getLogger("transformers").propagate = True
    model, tokenizer = load_model(with_code, device="cpu"), load_tokenizer(with_code)
    expected, _ = model.chat(tokenizer, "你好", **GREEDY)
    for given in (
        {"model": str(with_code), "trust_remote_code": True},
        {"model": model, "tokenizer": tokenizer},
        {"model": str(with_code), "tokenizer": str(with_code), "device": "cpu", "dtype": "float32"},
    ):
        ask = pipeline("text-generation", **given)
        assert not recwarn.list
        [answer] = ask([{"role": "user", "content": "你好"}], **GREEDY)
        assert answer["generated_text"][-1]["content"].strip() == expected.strip()
        [text] = ask("你好", **GREEDY)
        assert text["generated_text"].startswith("你好")
        assert len(ask(["你好", "今天"], batch_size=2, **GREEDY)) == 2
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
