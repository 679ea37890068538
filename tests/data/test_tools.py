"""Rows with tools in every layout users have: announced, called, answered, as the release writes them."""

from __future__ import annotations

import json

import pytest

from glmtune.data.dataset import load_conversations
from glmtune.data.encode import encode_training_row
from glmtune.data.reading.layouts import convert, detect_layout
from glmtune.data.records import Conversation, RawRow, RowProblem, RowsDigest
from glmtune.data.settings import DataSettings
from glmtune.labels import IGNORE_INDEX
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import template_for
from glmtune.models.templates.responses import process_response
from glmtune.models.templates.tool_calls import write_tools

TOOL = {"name": "weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def messages_of(row: dict[str, object]) -> tuple[Message, ...]:
    settings = DataSettings(max_source_length=1000, max_target_length=1000)
    return convert(detect_layout([RawRow(row, 1)], settings, "rows"), row)


def rendered(row: dict[str, object], release: str) -> str:
    template = template_for(release)
    return template.render(write_tools(template, messages_of(row)))


def openai_call(name: str, **arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


PYTHON = "```python\ntool_call(city='北京', days=2)\n```"
JSON = '{"city": "北京", "days": 2}'
CALLS = {
    "openai": {
        "role": "assistant",
        "content": None,
        "tool_calls": [openai_call("weather", city="北京", days=2)],
    },
    "openai, old": {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": JSON},
    },
    "sharegpt": {"role": "function_call", "content": f'{{"name": "weather", "arguments": {JSON}}}'},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_call_is_written_and_read_back_as_its_release_does(call):
    row = {"messages": [USER, call, {"role": "tool", "content": "晴", "tool_call_id": "x"}, ANSWER]}
    for release, content in ((Family.CHATGLM3, PYTHON), (Family.GLM4, JSON)):
        text = rendered(row, release)
        assert f"<|assistant|>weather\n{content}<|observation|>\n晴<|assistant|>\na" in text
        response = process_response(release, f"weather\n{content}", tools_announced=True)
        assert response.content == {"name": "weather", "parameters": {"city": "北京", "days": 2}}


def test_arguments_that_python_has_no_names_for_come_back_too():
    text = template_for(Family.CHATGLM3).call_text({"from": 1, "x y": None})
    read = process_response(Family.CHATGLM3, f"f\n{text}", tools_announced=True)
    assert read.content == {"name": "f", "parameters": {"from": 1, "x y": None}}


def test_text_and_calls_of_one_message_are_both_kept():
    both = {"role": "assistant", "content": "等一下", "tool_calls": [openai_call("a", x=1), openai_call("b")]}
    row = {
        "messages": [USER, both, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, ANSWER]
    }
    assert rendered(row, Family.GLM4) == (
        '[gMASK]<sop><|user|>\nq<|assistant|>\n等一下<|assistant|>a\n{"x": 1}<|assistant|>b\n{}'
        "<|observation|>\n1<|observation|>\n2<|assistant|>\na"
    )


@pytest.mark.parametrize("content", ["", None])
def test_tools_reach_the_prompt_from_wherever_they_stand(content):
    in_system = {"messages": [{"role": "system", "content": content, "tools": [WRAPPED]}, USER, ANSWER]}
    beside = {"messages": [USER, ANSWER], "tools": [WRAPPED]}
    as_text = {"conversations": [{"from": "human", "value": "q"}, ANSWER], "tools": json.dumps([TOOL])}
    readme = {"tools": [TOOL], "conversations": [{"role": "system", "content": content or ""}, USER, ANSWER]}
    described = json.dumps(TOOL, indent=4, ensure_ascii=False)
    for row in (in_system, beside, as_text):
        glm4 = rendered(row, Family.GLM4)
        assert glm4.startswith("[gMASK]<sop><|system|>\n# 可用工具\n\n## weather\n\n" + described)
        listed = json.dumps([TOOL], indent=4, ensure_ascii=False)
        assert rendered(row, Family.CHATGLM3).startswith(f"<|system|>\n\n{listed}<|user|>\nq")
    assert rendered(readme, Family.GLM4) == rendered(beside, Family.GLM4)


def test_the_readme_layout_of_chatglm3(tiny_chatglm3_tokenizer):
    step = {
        "role": "tool",
        "name": "weather",
        "parameters": {"city": "北京", "days": 2},
        "observation": {"t": 22},
    }
    row = {"tools": [TOOL], "conversations": [USER, {"role": "assistant", "content": "look"}, step, ANSWER]}
    expected = f'<|user|>\nq<|assistant|>\nlook<|assistant|>weather\n{PYTHON}<|observation|>\n{{"t": 22}}<|assistant|>\na'
    assert rendered(row, Family.CHATGLM3).endswith(expected)


def learnt_text(tokenizer, row: dict[str, object], **settings: object) -> list[str]:
    data = DataSettings(max_source_length=1000, max_target_length=1000, **settings)
    rows = encode_training_row(tokenizer, Conversation(messages_of(row), "rows", 1), data)
    return [tokenizer.decode([token for token in each.labels if token != IGNORE_INDEX]) for each in rows]


LONG = [USER, {"role": "assistant", "content": "first"}, USER, {"role": "assistant", "content": "second"}]


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}])
def test_messages_left_out_are_not_learnt(flag, tiny_chatglm3_tokenizer, tiny_tokenizer):
    for tokenizer in (tiny_chatglm3_tokenizer, tiny_tokenizer):
        without_first = {"messages": [USER, {**LONG[1], **flag}, *LONG[2:]]}
        learnt = "".join(learnt_text(tokenizer, without_first, loss_on="all_turns"))
        assert "second" in learnt
        assert "first" not in learnt
        without_last = {"messages": [*LONG[:3], {**LONG[3], **flag}]}
        learnt = "".join(learnt_text(tokenizer, without_last, loss_on="all_turns"))
        assert "first" in learnt
        assert "second" not in learnt
        with pytest.raises(RowProblem, match=r"nothing of it is learnt.*loss_on=all_turns"):
            learnt_text(tokenizer, without_last)


WRONG = {
    "weight": ([USER, {**ANSWER, "weight": 0.5}], "`messages.1..weight` is 0.5"),
    "loss": ([USER, {**ANSWER, "loss": "no"}], "`messages.1..loss` is 'no'"),
    "tools of a user": ([{**USER, "tools": [TOOL]}, ANSWER], "announces tools, which only `system` does"),
    "a user's call": (
        [{**USER, "tool_calls": [openai_call("f")]}, ANSWER],
        "calls tools, which only `assist",
    ),
    "tools": ([{"role": "system", "content": "s", "tools": 3}, USER, ANSWER], "must be a list of tool desc"),
    "calls": ([USER, {"role": "assistant", "tool_calls": {"a": 1}}], "must be a list of calls"),
    "name": ([USER, {"role": "assistant", "function_call": {"arguments": "{}"}}], "`.*name` is missing"),
    "no result": ([USER, {"role": "tool", "name": "f", "parameters": {}}, ANSWER], "observation` is missing"),
}


@pytest.mark.parametrize(("messages", "error"), WRONG.values(), ids=list(WRONG))
def test_wrong_tools_are_refused_by_their_place(messages, error):
    with pytest.raises(RowProblem, match=error):
        messages_of({"messages": messages})


def test_releases_without_tools_refuse_the_row(tiny_tokenizer):
    for row in ({"messages": [USER, ANSWER], "tools": [TOOL]}, {"messages": [USER, CALLS["openai"]]}):
        with pytest.raises(RowProblem, match="knows no tools"):
            learnt_text(tiny_tokenizer, row)


def test_keys_that_nothing_reads_are_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"id": 7, "messages": [{**USER, "name": "Li"}, {**ANSWER, "annotator": "hm", "tool_call_id": "x"}]}
    path.write_text(json.dumps(row), encoding="utf-8")
    loaded = load_conversations(DataSettings(train_file=str(path)), "train")
    assert loaded.unused_columns == ("id", "messages[].annotator")


def fingerprint(conversation: Conversation) -> str:
    digest = RowsDigest()
    digest.add(conversation)
    return digest.hexdigest()


def test_plain_rows_keep_their_fingerprint_and_tools_change_it():
    plain = Conversation((Message("user", "q"), Message("assistant", "a")), "rows", 1)
    others = [
        Conversation((Message("user", "q"), Message("assistant", "a", has_loss=False)), "rows", 1),
        Conversation((Message("system", "", tools="[]"), *plain.messages), "rows", 1),
    ]
    assert fingerprint(plain) == "b509fb61509a04de3445f87141a266d2eacaa1e9b600ea3c68e4129efddb5b52"
    assert len({fingerprint(each) for each in (plain, *others)}) == 3
