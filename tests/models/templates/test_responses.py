"""Clean-ups of answers: the cases of the released code, and what they do not show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.responses import Response, process_response

CALL = "get_weather\n```python\ntool_call(city='北京', days=3)\n```"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("v1", "chatglm"),
        ("tiny_v1", "chatglm"),
        ("v2", "chatglm2"),
        ("v2", "chatglm2-32k"),
        ("tiny_v2", "chatglm2"),
    ],
)
def test_texts_of_the_release(oracles: Path, name: str, family: str) -> None:
    cases = json.loads((oracles / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))[
        "process_response"
    ]
    assert cases
    for raw, cleaned in cases:
        assert process_response(Family(family), raw) == Response(cleaned, (Message("assistant", cleaned),))


@pytest.mark.parametrize("name", ["glm3", "tiny_glm3"])
def test_messages_of_the_release(oracles: Path, name: str) -> None:
    cases = json.loads((oracles / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))[
        "process_response"
    ]
    assert cases
    for case in cases:
        response = process_response(Family.CHATGLM3, case["output"])
        assert response.content == case["content"]
        written = [(item.role, item.metadata, item.content) for item in response.messages]
        asked, *answers = case["history"]
        assert asked["role"] == "user"
        assert written == [(item["role"], item["metadata"], item["content"]) for item in answers]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("好,,好", "好，，好"),
        ("a,好,b", "a，好，b"),
        ("3:4, 5!", "3:4, 5!"),
        ("\n是的;谢谢 \n", "是的；谢谢"),
        ("好。,好", "好。，好"),
        ("こ,ん", "こ,ん"),
        ("", ""),
    ],
)
def test_punctuation_of_chatglm(raw: str, cleaned: str) -> None:
    assert process_response(Family.CHATGLM, raw).content == cleaned


def test_codegeex2_keeps_blanks() -> None:
    assert process_response(Family.CODEGEEX2, "    return 1\n").content == "    return 1\n"


@pytest.mark.parametrize("family", [Family.CHATGLM3, Family.CHATGLM3_32K])
def test_announced_tools_of_chatglm3_are_called_with_parameters(family: Family) -> None:
    response = process_response(family, CALL, tools_announced=True)
    assert response.content == {"name": "get_weather", "parameters": {"city": "北京", "days": 3}}
    assert response.messages == (Message("assistant", CALL.partition("\n")[2], "get_weather"),)


def test_announced_tools_of_glm4_are_called_with_json() -> None:
    response = process_response(Family.GLM4, 'get_weather\n{"city": "北京"}', tools_announced=True)
    assert response.content == {"name": "get_weather", "parameters": {"city": "北京"}}
    assert process_response(Family.GLM4, " \n你好[[训练时间]]").content == "你好2023年"


@pytest.mark.parametrize(
    "code",
    [
        "```python\nprint(open('x').read())\n```",
        "```python\ntool_call(city=open('x'))\n```",
        "```python\ntool_call(\n```",
        "```python\ncity = 1\n```",
        "tool_call(city=1)",
        "",
    ],
)
def test_code_is_returned_and_never_run(code: str) -> None:
    """A code interpreter's program, or a call that is none of literals, comes back as it was written."""
    for family in (Family.CHATGLM3, Family.GLM4):
        response = process_response(family, f"interpreter\n{code}", tools_announced=True)
        assert response.content == {"name": "interpreter", "content": code}
