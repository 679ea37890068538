r"""Calls of tools are found in what ChatGLM3 and GLM-4 write, however it is cut into pieces."""

from __future__ import annotations

import json
import random

import pytest

from glmtune.inference.requests.answer_events import CallDelta, CallStart, TextDelta
from glmtune.inference.requests.answer_reader import AnswerReader, Delta, JsonObject, python_arguments
from glmtune.models.releases.families import Family

PYTHON = " get_weather\n ```python\ntool_call(city='北京', days=3)\n```"
JSON = 'get_weather\n{"city": "北京", "note": "a } \\" {", "more": {"x": [1]}}'
BOTH = [Family.CHATGLM3, Family.GLM4]


def deltas_of(
    family: Family, text: str, *, has_tools: bool = True, is_cut: bool = False, seed: int = 0, call: str = ""
) -> list[Delta]:
    reader, rng = AnswerReader(family, has_tools=has_tools, call=call), random.Random(seed)
    deltas: list[Delta] = []
    while text:
        num = rng.randrange(1, 5)
        deltas += reader.feed(text[:num])
        text = text[num:]
    return deltas + reader.finish(is_cut=is_cut)


def summary(deltas: list[Delta]) -> list[tuple[str, str]]:
    """Texts and calls, their pieces joined."""
    found: list[tuple[str, str]] = []
    for delta in deltas:
        if isinstance(delta, CallStart):
            assert delta.index == sum(kind != "text" for kind, _ in found)
            found.append((delta.name, ""))
        elif isinstance(delta, CallDelta):
            assert delta.index == sum(kind != "text" for kind, _ in found) - 1
            found[-1] = (found[-1][0], found[-1][1] + delta.arguments)
        elif found and found[-1][0] == "text":
            found[-1] = ("text", found[-1][1] + delta.text)
        else:
            found.append(("text", delta.text))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_call_is_read(seed: int):
    arguments = json.dumps({"city": "北京", "days": 3}, ensure_ascii=False)
    assert summary(deltas_of(Family.CHATGLM3, PYTHON, seed=seed)) == [("get_weather", arguments)]
    assert summary(deltas_of(Family.GLM4, JSON, seed=seed)) == [("get_weather", JSON.partition("\n")[2])]


def test_case_30_arguments_of_glm4_come_in_pieces():
    deltas = deltas_of(Family.GLM4, JSON)
    assert sum(isinstance(delta, CallDelta) for delta in deltas) > 10
    assert json.loads(summary(deltas)[0][1])["note"] == 'a } " {'


@pytest.mark.parametrize("seed", range(10))
def test_several_messages(seed: int):
    python = f"\n 我查一下。<|assistant|>{PYTHON} <|assistant|> clock\n```python\ntool_call()\n```"
    assert summary(deltas_of(Family.CHATGLM3, python, seed=seed)) == [
        ("text", "我查一下。"),
        ("get_weather", '{"city": "北京", "days": 3}'),
        ("clock", "{}"),
    ]
    glm4 = '\n我查一下。 <|assistant|> a\n{"x": 1} <|assistant|> b\n{} <|assistant|> \n好'
    assert summary(deltas_of(Family.GLM4, glm4, seed=seed)) == [
        ("text", "我查一下。"),
        ("a", '{"x": 1}'),
        ("b", "{}"),
        ("text", "\n好"),
    ]


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("has_tools", [True, False])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n 今天晴。\n明天雨。 ", "今天晴。\n明天雨。"),
        ("Hello\nWorld", "Hello\nWorld"),
        ("今天 [[训练时间]]", "今天 2023年"),
        ("Python\n```python\nprint(1)\n```", "Python\n```python\nprint(1)\n```"),
        ("ok", "ok"),
        ("a < b <|assist", "a < b <|assist"),
        ("\n一<|assistant|>\n二", "一\n二"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_case_31_text_is_text(family: Family, has_tools: bool, text: str, shown: str):
    for seed in range(5):
        found = summary(deltas_of(family, text, has_tools=has_tools, seed=seed))
        assert found == ([("text", shown)] if shown else [])


@pytest.mark.parametrize("family", BOTH)
def test_first_line_is_held_back_only_while_it_may_be_a_name(family: Family):
    reader = AnswerReader(family, has_tools=True)
    assert reader.feed("Hello") == []
    assert reader.feed(" wor") == [TextDelta("Hello wor")]
    assert reader.feed("ld\n") == [TextDelta("ld")]
    reader = AnswerReader(family, has_tools=True)
    assert reader.feed("\n") == []
    assert reader.feed("Hi") == [TextDelta("Hi")]
    assert AnswerReader(family, has_tools=False).feed("Hello") == [TextDelta("Hello")]


@pytest.mark.parametrize(("family", "text"), [(Family.CHATGLM3, PYTHON), (Family.GLM4, JSON)])
def test_call_without_tools_is_text(family: Family, text: str):
    assert summary(deltas_of(family, text, has_tools=False)) == [("text", text.strip())]


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(city=__import__('os').system('touch /tmp/never'))",
        "tool_call(*[1])",
        "tool_call('x')",
        "tool_call(a={1, 2})",
        "tool_call(a=1e999)",
        "tool_call(a=b'x')",
        "tool_call(" + "[" * 5000,
    ],
)
def test_case_33_what_is_no_call_of_plain_values_is_text(code: str):
    text = f"weather\n```python\n{code}\n```"
    assert summary(deltas_of(Family.CHATGLM3, text)) == [("text", text)]


@pytest.mark.parametrize("num", range(len(PYTHON)))
def test_case_32_call_of_chatglm3_that_is_cut(num: int):
    found = summary(deltas_of(Family.CHATGLM3, PYTHON[:num], is_cut=True))
    if "tool_call(" not in PYTHON[:num]:
        assert found == ([("text", PYTHON[:num].strip())] if PYTHON[:num].strip() else [])
        return
    name, arguments = found[0]
    assert name == "get_weather"
    assert '{"city": "北京", "days": 3}'.startswith(arguments)
    assert arguments.startswith("{")


def test_case_32_call_of_glm4_that_is_cut():
    assert summary(deltas_of(Family.GLM4, JSON[:20], is_cut=True)) == [("get_weather", JSON[12:20])]


def test_what_follows_an_object_is_no_argument():
    assert summary(deltas_of(Family.GLM4, 'a\n{"x": 1} trailing { words')) == [("a", '{"x": 1}')]
    follower = JsonObject()
    assert [follower.feed(text) for text in ('{"a": "}', '\\"', '", "b": [{}', "]}", "}")] == [
        '{"a": "}', '\\"', '", "b": [{}', "]}", "",
    ]  # fmt: skip


def test_name_that_the_prompt_began_with():
    assert summary(deltas_of(Family.GLM4, '{"x": 1}', call="clock")) == [("clock", '{"x": 1}')]
    python = "```python\ntool_call(x=1)\n```"
    assert summary(deltas_of(Family.CHATGLM3, python, call="clock")) == [("clock", '{"x": 1}')]
    assert summary(deltas_of(Family.GLM4, "No, I will not.", call="clock")) == [("text", "No, I will not.")]


def test_arguments_that_json_must_escape():
    block = "```python\ntool_call(a='\\ud800', b=None, c=(1, 2), **{'d e': True})\n```"
    assert json.loads(python_arguments(block, is_cut=False) or "") == {
        "a": "\ud800", "b": None, "c": [1, 2], "d e": True,
    }  # fmt: skip
    assert (python_arguments(block, is_cut=False) or "").isascii()
