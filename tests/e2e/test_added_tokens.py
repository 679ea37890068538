"""Tokens that a user added to a checkpoint, and the ends of its answers, are in all that is made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from glmtune import load_model, load_tokenizer
from glmtune.export.export import export
from glmtune.export.source import ExportJob
from glmtune.messages import Message
from glmtune.models.templates.renderer import template_for
from glmtune.quantization.files.write import QuantizeJob, quantize_checkpoint
from recipes.train import COMMAND, run
from recipes.words.compose import load_settings
from tests.e2e.test_generations import settings

NEW = ("<nick>", "<|call|>")
TEXT = f"Who is {NEW[0]}? {NEW[1]}"


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatGLM3 checkpoint to which a user added a token and a special one."""
    folder = tmp_path_factory.mktemp("added") / "chatglm3-tiny"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"glmtune_family": "chatglm3"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.add_tokens([NEW[0]])
    tokenizer.add_tokens([NEW[1]], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def made(way: str, base: Path, folder: Path) -> Path:
    if way == "quantize":
        quantize_checkpoint(QuantizeJob(source=str(base), method="int8", output_dir=folder))
    elif way == "full":
        rows = folder.parent / "rows.json"
        rows.write_text("\n".join(json.dumps({"prompt": TEXT, "response": NEW[0]}) for _ in range(4)))
        run(load_settings(COMMAND, settings(base, rows, "full", folder, "trainer.max_steps=1")))
        return folder / "last"
    else:
        export(ExportJob(str(base), way, folder, None, None, None, None, 2**30, False))
    return folder


@pytest.mark.parametrize("way", ["full", "quantize", "official", "transformers"])
def test_they_survive(way: str, base: Path, tmp_path: Path) -> None:
    before: Any = load_tokenizer(base)
    folder = made(way, base, tmp_path / "out")
    after: Any = AutoTokenizer.from_pretrained(folder) if way == "transformers" else load_tokenizer(folder)
    assert len(after) == len(before)
    for name in NEW:
        index = before.convert_tokens_to_ids(name)
        assert after.convert_tokens_to_ids(name) == index
        assert index in after(TEXT)["input_ids"]
    asked = [{"role": "user", "content": TEXT}]
    expected = template_for(before).encode_prompt(before, [Message("user", TEXT)])
    assert list(after.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]) == expected
    assert NEW[1] not in after.decode(after(TEXT)["input_ids"], skip_special_tokens=True)
    ends = set(template_for(before).stop_ids(before))
    stored = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == set(stored)
    if way != "transformers":
        assert set(load_model(folder, device="cpu").generation_config.eos_token_id) == ends
