"""`glmtune chat`'s settings: what is refused, and what a talk begins with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from recipes.chat import COMMAND, ChatConfig, _session
from recipes.words.compose import load_settings
from recipes.words.reading import read_words
from tests.interactive.scripted import ScriptedAnswerer
from tests.interactive.scripted_server import scripted_server


def settings(*words: str) -> ChatConfig:
    return load_settings(COMMAND, read_words(words, COMMAND).overrides)


def test_settings_as_people_type_them(tmp_path: Path) -> None:
    config = settings(
        "THUDM/chatglm3-6b",
        "--system",
        "你是助手，简短：好",
        "--max_tokens",
        "9",
        "temperature=0",
        "quantization=int4",
    )
    assert config.model.source == "THUDM/chatglm3-6b"
    assert config.model.quantization == "int4"
    assert (config.system, config.max_new_tokens, config.temperature) == ("你是助手，简短：好", 9, 0.0)
    assert settings("prefix_path={style:runs/a}").prefix_path == {"style": "runs/a"}
    assert settings("--api_base", "http://localhost:8000/v1").url == "http://localhost:8000/v1"


def test_a_talk_begins_with_what_was_chosen(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "a"}}]), "utf-8")
    config = settings("system=短", "temperature=0.5", "seed=3", f"tools={tools}")
    session = _session(config, ScriptedAnswerer([]), "")
    assert session.conversation.system == "短"
    assert session.sampling == {"temperature": 0.5, "seed": 3}
    assert session.tools == ({"type": "function", "function": {"name": "a"}},)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["url_model=x"], "`url_model` is `x`, but no server is named"),
        (["url=localhost:1", "model.dtype=float32"], "`model.dtype` is of a model in this process"),
        (["url=localhost:1", "prefix_path=runs/a"], "`prefix_path` is of a model in this process"),
        (["url=localhost:1", "quantization=int4"], "`quantization` is of a model in this process"),
        (
            ["url=localhost:1", "quantization_embeddings=int8"],
            "`quantization_embeddings` is of a model in this process",
        ),
        (["url=ftp://x"], "`url` is `ftp://x`, but it must start with http"),
        (["url=127.0.0.1:1"], "http://127.0.0.1:1/v1 cannot be reached"),
        (["prefix_path=runs/a", "adapter_path=other/a"], "both have the name `a`"),
        (["temprature=1"], "Did you mean `temperature`"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_server_refuses_in_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server() as server:
        assert main(["chat", f"url={server.url}", "url_model=stile"]) == 2
    assert "Did you mean `style`?" in capsys.readouterr().err
