"""A native export is read by transformers alone: another process, in which glmtune cannot be imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.export.export import export
from glmtune.export.source import ExportJob
from glmtune.messages import Message
from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import build_model
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.load import load_tokenizer_folder

RANKS = Path(__file__).resolve().parent.parent / "golden" / "tokenizers" / "glm4" / "tokenizer.model"
TURNS = (("user", "你好，今天想去哪里？"), ("assistant", "Hello  there!"), ("user", "3 + 4 = ?"))
TEXT = "plain  text\n世界 42"
FAMILIES = (Family.CHATGLM2, Family.CHATGLM3, Family.GLM4)
READER = """
import json, sys
sys.modules["glmtune"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folders, turns, text = json.loads(sys.argv[1])
found = []
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [dict(zip(("role", "content"), turn)) for turn in turns]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    logits = model(**prompt).logits[0, -1, :8]
    model.generation_config.eos_token_id, stops = None, model.generation_config.eos_token_id
    answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    ids = tokenizer(text)["input_ids"]
    found.append({
        "class": type(model).__name__, "prompt": prompt["input_ids"][0].tolist(), "answer": answer[0].tolist(),
        "stops": stops, "logits": logits.tolist(), "ids": ids,
        "decoded": tokenizer.decode(ids, skip_special_tokens=True),
    })
print(json.dumps(found))
"""


def make_source(family: Family, tokenizer_folder: Path, folder: Path) -> Path:
    """A random checkpoint of a generation with its tokenizer."""
    if family is Family.GLM4:
        folder.mkdir()
        shutil.copy(RANKS, folder)
    else:
        shutil.copytree(tokenizer_folder, folder)
        (folder / "tokenizer_config.json").unlink()
    tokenizer: Any = load_tokenizer_folder(folder, family)
    official = {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8, "num_attention_heads": 4,
        "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "seq_length": 256,
        "padded_vocab_size": (len(tokenizer) + 63) // 64 * 64, "torch_dtype": "float32",
        "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    build_model(native_config(official, family)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def read(
    tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Family, tuple[Path, dict[str, Any]]]:
    """The source of each generation, and what the other process found in its export."""
    folder = tmp_path_factory.mktemp("plain")
    sources = {
        family: make_source(family, tiny_tokenizer_folder, folder / f"{family.value} source")
        for family in FAMILIES
    }
    outs = [str(folder / family.value) for family in FAMILIES]
    for (family, source), out in zip(sources.items(), outs, strict=True):
        export(ExportJob(str(source), "transformers", Path(out), family, None, None, None, 2**30, False))
    arguments = json.dumps([outs, TURNS, TEXT])
    done = subprocess.run(
        [sys.executable, "-c", READER, arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {family: (sources[family], each) for family, each in zip(FAMILIES, found, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_tokenizer_and_prompt_without_our_code(
    family: Family, read: dict[Family, tuple[Path, dict[str, Any]]]
) -> None:
    source, found = read[family]
    tokenizer: Any = load_tokenizer_folder(source, family)
    template = template_for(tokenizer)
    prompt = template.encode_prompt(tokenizer, [Message(role, text) for role, text in TURNS])  # pyright: ignore[reportArgumentType]
    from glmtune.models.load import load_official

    model = load_official(source, dtype="float32", device="cpu", family=family)
    ids = torch.tensor([prompt])
    assert found["class"] == "GlmForCausalLM"
    assert found["prompt"] == prompt
    torch.testing.assert_close(torch.tensor(found["logits"]), model(ids).logits[0, -1, :8].detach())
    answer = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert found["answer"] == answer[0].tolist()
    stops = found["stops"] if isinstance(found["stops"], list) else [found["stops"]]
    assert set(template.stop_ids(tokenizer)) <= set(stops)
    assert found["ids"] == [*tokenizer.prefix_ids, *tokenizer.text_ids(TEXT)]
    assert found["decoded"] == TEXT
