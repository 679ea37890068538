"""Programs inside a tokenizer's files, which other tools would run: not copied on unless ours or asked for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.models.releases.families import Family
from glmtune.models.templates.jinja_forms import CHAT_TEMPLATES
from glmtune.models.tokenizers.load import load_tokenizer_folder

EVIL = "{{ cycler.__init__.__globals__.os.popen('id').read() }}"
STRANGER = "another--repository.Tokenizer"


@pytest.fixture
def hostile_base(tiny_base: Path, tmp_path: Path) -> Path:
    """A complete checkpoint whose tokenizer brings templates, code and names of code elsewhere."""
    folder = tmp_path / "base" / "chatglm2-tiny"
    shutil.copytree(tiny_base, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config |= {"auto_map": {"AutoTokenizer": [STRANGER, None]}, "response_schema": {"x-regex": EVIL}}
    file.write_text(json.dumps(config | {"chat_template": EVIL}), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(EVIL, encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text(EVIL, encoding="utf-8")
    for name in ("tokenization_chatglm.py", "modeling_chatglm.py"):
        (folder / name).write_text(f"raise SystemExit({EVIL!r})", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": STRANGER}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def holders(folder: Path, text: str) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return [path.name for path in files if text.encode() in path.read_bytes()]


COMMANDS = {
    "quantize": ["quantize", "bits=8"],
    "export": ["export", "format=official"],
    "transformers": ["export", "format=transformers"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_strangers_programs_are_not_copied_on(
    command: str, hostile_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        assert main([*COMMANDS[command], f"model={hostile_base}", f"output_dir={out}"]) == 0
    assert holders(out, "os.popen(") == []
    assert holders(out, STRANGER) == []
    assert not list(out.rglob("*.py"))
    said = [record.getMessage() for record in caplog.records if "is not copied on" in record.getMessage()]
    assert len(said) == (command != "transformers"), "one line where it is dropped; there ours is written"
    assert all("keep_chat_template=true" in line for line in said)


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_a_template_is_copied_where_it_is_asked_for(command: str, hostile_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*COMMANDS[command], f"model={hostile_base}", f"output_dir={out}", "keep_chat_template=true"]
    assert main(words) == 0
    assert "chat_template.jinja" in holders(out, "os.popen(")
    assert holders(out, STRANGER) == [], "nobody can ask for code"


def test_settings_that_would_do_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "model=glm-tiny", "keep_chat_template=true"]) == 2
    assert main(["train", "+recipe=ptuning", "keep_chat_template=true"]) == 2
    error = capsys.readouterr().err
    assert "`format=transformers` writes no template" in error
    assert "`tune=prefix` writes no tokenizer" in error


@pytest.mark.parametrize("form", ["text", "list"])
def test_tokenizers_saved_by_hand(form: str, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_tokenizer_folder, source)
    template = EVIL if form == "text" else [{"name": "default", "template": EVIL}]
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    tokenizer = load_tokenizer_folder(source, Family.CHATGLM2)
    assert tokenizer.chat_template, "it is there, and never used: prompts are our renderer's"
    tokenizer.save_pretrained(tmp_path / "a")
    assert holders(tmp_path / "a", "os.popen(") == []
    own = "{{ messages }}"
    tokenizer.chat_template = own
    tokenizer.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text(encoding="utf-8") == own


def test_ours_is_copied(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_tokenizer_folder, source)
    ours = CHAT_TEMPLATES[Family.CHATGLM2]
    (source / "chat_template.jinja").write_text(ours, encoding="utf-8")
    load_tokenizer_folder(source, Family.CHATGLM2).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == ours
