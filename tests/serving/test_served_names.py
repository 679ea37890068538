"""Names of models: derived, given, and those that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmtune.errors import ConfigError
from glmtune.inference.adapter_names import named_paths, tuned_paths
from glmtune.serving.served_names import base_names, default_model
from glmtune.serving.settings import AccessSettings, LimitSettings
from recipes.serve import COMMAND
from recipes.words.compose import load_settings


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("prefix_path=runs/adgen", {"adgen": "runs/adgen"}),
        ("prefix_path={style:runs/a,polite:runs/b}", {"style": "runs/a", "polite": "runs/b"}),
        (
            "prefix_path=[runs/a,runs/b/checkpoint-20]",
            {"a": "runs/a", "b-checkpoint-20": "runs/b/checkpoint-20"},
        ),
        ("prefix_path=跑/一", {"一": "跑/一"}),
        ("ptuning_checkpoint=runs/adgen/last", {"adgen": "runs/adgen/last"}),
    ],
)
def test_as_typed(word: str, expected: dict[str, str]) -> None:
    settings = load_settings(COMMAND, [word])
    assert named_paths("prefix_path", settings.prefix_path) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"a b": "x"}, "`a b`"),
        ({"": "x"}, "1 to 64 letters"),
        ({"../up": "x"}, "`../up`"),
        (["runs/a", "other/a"], "two adapters of the name `a`"),
        ("{风格:跑/一}", "in quotes"),
    ],
)
def test_names_that_cannot_be(given: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        named_paths("prefix_path", given)  # type: ignore[arg-type]


def test_names_of_the_base(tmp_path: Path) -> None:
    assert base_names("glm-tiny", None, []) == ("glm-tiny",)
    assert base_names("THUDM/chatglm2-6b", None, []) == ("chatglm2-6b", "THUDM/chatglm2-6b")
    assert base_names(str(tmp_path), None, []) == (tmp_path.name,)
    assert base_names("glm-tiny", ["gpt-3.5-turbo"], ["a"]) == ("gpt-3.5-turbo",)
    with pytest.raises(ConfigError, match="both called `glm-tiny`"):
        base_names("glm-tiny", None, ["glm-tiny"])
    with pytest.raises(ConfigError, match="`model_names` is empty"):
        base_names("glm-tiny", [], [])


def test_what_answers_by_default() -> None:
    assert default_model(None, ["base"], []) == "base"
    assert default_model(None, ["base"], ["one"]) == "one"
    assert default_model(None, ["base"], ["one", "two"]) == "base"
    assert default_model("two", ["base"], ["one", "two"]) == "two"
    with pytest.raises(ConfigError, match="Did you mean `two`"):
        default_model("twoo", ["base"], ["one", "two"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cors_origins": ["https://a.example/path"]}, "access.cors_origins"),
        ({"cors_origins": ["a.example"]}, "access.cors_origins"),
        ({"allowed_hosts": ["https://a.example"]}, "access.allowed_hosts"),
        ({"allowed_hosts": ["a.example:80"]}, "access.allowed_hosts"),
        ({"admin": True}, "access.adapter_dir"),
        ({"adapter_dir": "runs"}, "access.admin=true"),
    ],
)
def test_access_that_cannot_be(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AccessSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_requests", "max_body_bytes", "header_seconds", "keep_alive_seconds"])
def test_limits_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"`limits.{name}` is 0"):
        LimitSettings(**{name: 0})


def test_a_prefix_and_a_lora_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"both have the name `a`.*`prefix_path=\{tuned:runs/a\}`"):
        tuned_paths("runs/a", {"a": "runs/b"})
    assert tuned_paths("runs/a", "runs/b") == ({"a": "runs/a"}, {"b": "runs/b"})
