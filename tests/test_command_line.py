"""Commands as text: secrets stay out, and what is to be typed next can be typed."""

from __future__ import annotations

import shlex

import pytest

from glmtune.command_line import command_words, data_words, model_words, typed_command, without_secrets
from glmtune.data.settings import DataSettings
from recipes.predict import COMMAND as PREDICT
from recipes.words.compose import load_settings

KEY = "sk-abcdefghijklmnop1234"
ENVIRONMENT = {"MY_TOKEN": "very-secret-value", "HOME": "/home/me", "SHORT_KEY": "1"}


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("endpoint.api_key=abc", "endpoint.api_key=***"),
        ("endpoint.api_key=${oc.env:KEY}", "endpoint.api_key=${oc.env:KEY}"),
        ("data.source_prefix=very-secret-value", "data.source_prefix=${oc.env:MY_TOKEN}"),
        (f"endpoint.model={KEY}", "endpoint.model=***"),
        ("model.source=hf_AAAABBBBCCCCDDDD", "model.source=***"),
        ("endpoint.base_url=https://me:pass@host/v1", "endpoint.base_url=https://***@host/v1"),
        ("WANDB_API_KEY=0123", "WANDB_API_KEY=***"),
        ("trainer.max_steps=100", "trainer.max_steps=100"),
        ("generation.max_new_tokens=128", "generation.max_new_tokens=128"),
        ("+recipe=ptuning", "+recipe=ptuning"),
        ("data.train_file=客服 数据/训练.jsonl", "data.train_file=客服 数据/训练.jsonl"),
    ],
)
def test_secrets_stay_out(word: str, kept: str) -> None:
    said = without_secrets(["glmtune", "train", word], ENVIRONMENT)
    assert shlex.split(said) == ["glmtune", "train", kept]


def test_the_command_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLMTUNE_COMMAND", raising=False)
    monkeypatch.setattr("sys.argv", ["/usr/bin/glmtune", "train", "output_dir=my runs/a"])
    assert typed_command() == "glmtune train 'output_dir=my runs/a'"
    monkeypatch.setattr("sys.argv", ["/somewhere/glmtune/__main__.py", "train"])
    assert typed_command() == "glmtune train"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataSettings(train_file="shipped:ads/train.jsonl"), {"data": "ads"}),
        (
            DataSettings(
                train_file="a.json", validation_file="b c.json", prompt_column="q", response_column="r"
            ),
            {"data.test_file": "b c.json", "data.prompt_column": "q", "data.response_column": "r"},
        ),
        (DataSettings(train_file="a.json"), {"data.train_file": "a.json", "split": "train"}),
        (DataSettings(train_file="a.json", test_file="t.json"), {"data.test_file": "t.json"}),
    ],
)
def test_predict_takes_the_data_of_a_run(data: DataSettings, words: dict[str, str]) -> None:
    from dataclasses import asdict

    given = data_words(asdict(data))
    assert {name: given.get(name) for name in words} == words
    command = shlex.split(command_words("predict", {"prefix_path": "runs/x", **given}))
    settings = load_settings(PREDICT, [f"{w.partition('=')[0]}={_quoted(w)}" for w in command[2:]])
    assert settings.data.file_of(settings.split) or settings.data.validation_file


def _quoted(word: str) -> str:
    value = word.partition("=")[2]
    return f"'{value}'" if " " in value else value


def test_the_model_is_named_as_one_types_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()

    def words(source: str, **more: str) -> str:
        return command_words("eval", model_words({"source": source, **more}))

    assert words("glm-tiny") == "glmtune eval"
    assert words("chatglm2-6b") == "glmtune eval model=chatglm2-6b"
    assert words("THUDM/chatglm2-6b") == "glmtune eval model=THUDM/chatglm2-6b"
    assert words("mine") == "glmtune eval model.source=mine"
    assert words("chatglm2-6b", quantization="int4") == "glmtune eval model=chatglm2-6b quantization=int4"
