"""The prompt templates against the prompts and chat inputs of the released code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import render_prompt, template_for
from glmtune.models.templates.responses import split_messages
from glmtune.models.templates.roles import ChatGLM3Template, system_with_tools
from glmtune.models.tokenizers.load import load_tokenizer_folder


def load(name: str, family: Family, oracles: Path, released: Path):
    folder = {
        "v1": released / "chatglm-6b",
        "v2": released / "chatglm2-6b",
        "glm3": released / "chatglm2-6b",
        "tiny_glm3": oracles / "tokenizers" / "tiny_v2",
    }.get(name, oracles / "tokenizers" / name)
    expected = json.loads((oracles / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
    return load_tokenizer_folder(folder, family), expected


@pytest.fixture(scope="module", params=["v2", "tiny_v2"])
def rounds(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path):
    return load(request.param, Family.CHATGLM2, oracles, released_tokenizers)


@pytest.fixture(scope="module", params=["glm3", "tiny_glm3"])
def roles(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path):
    return load(request.param, Family.CHATGLM3, oracles, released_tokenizers)


@pytest.fixture(scope="module", params=["v1", "tiny_v1", "v2", "tiny_v2"])
def numbered(request: pytest.FixtureRequest, oracles: Path, released_tokenizers: Path):
    family = Family.CHATGLM if request.param.endswith("v1") else Family.CHATGLM2
    return load(request.param, family, oracles, released_tokenizers)


@pytest.fixture(scope="module")
def glm4(oracles: Path, released_tokenizers: Path):
    return load("tiny_glm4", Family.GLM4, oracles, released_tokenizers)


def conversation(query: str, history: list[list[str]]) -> list[Message]:
    messages = [
        Message(role, text)
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [*messages, Message("user", query)]


def message(item: Mapping[str, Any]) -> Message:
    if "tools" in item:
        return system_with_tools(item["content"], item["tools"])
    return Message(item["role"], item["content"], item.get("metadata", ""))


def test_prompts_of_rounds(numbered):
    tokenizer, expected = numbered
    template = template_for(tokenizer)
    assert expected["prompts"]
    for case in expected["prompts"]:
        history = [tuple(turn) for turn in case["history"]]
        assert render_prompt(case["query"], history, template=template.name) == case["prompt"]
        messages = conversation(case["query"], case["history"])
        assert template.encode_prompt(tokenizer, messages) == case["ids"]
        chat = [{"role": item.role, "content": item.content} for item in messages]
        assert (
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == case["ids"]
        )
        assert (
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == case["prompt"]
        )


def test_continued_turns_of_chatglm2(rounds):
    tokenizer, expected = rounds
    template = template_for(tokenizer)
    assert expected["continued_chat_inputs"]
    for case in expected["continued_chat_inputs"]:
        messages = conversation(case["query"], [["q", "a"]] * case["turns_before"])
        assert [template.encode_continuation(tokenizer, messages)] == case["ids"]


def test_answers_cleaned_as_chatglm2_does(rounds):
    tokenizer, expected = rounds
    assert expected["process_response"]
    for raw, cleaned in expected["process_response"]:
        assert template_for(tokenizer).clean_answer(raw) == cleaned


def test_chat_inputs_of_glm4(glm4):
    tokenizer, expected = glm4
    template = template_for(tokenizer)
    assert expected["chat_inputs"]
    for case in expected["chat_inputs"]:
        prompt = case["add_generation_prompt"]
        messages = [*map(message, case["messages"])]
        assert template.render(messages, generation_prompt=prompt) == case["text"]
        assert [template.encode_prompt(tokenizer, messages, generation_prompt=prompt)] == case["input_ids"]
        chat, settings = case["messages"], {"add_generation_prompt": prompt}
        assert tokenizer.apply_chat_template(chat, tokenize=False, **settings) == case["text"]
        batch = tokenizer.apply_chat_template(chat, return_tensors="pt", **settings)
        for name in ("input_ids", "attention_mask", "position_ids"):
            assert batch[name].tolist() == case[name]


def test_chat_inputs_of_chatglm3(roles):
    tokenizer, expected = roles
    template = template_for(tokenizer)
    assert expected["chat_inputs"]
    for case in expected["chat_inputs"]:
        messages = [*map(message, case["history"]), Message(case["role"], case["query"])]
        assert [template.encode_prompt(tokenizer, messages)] == case["input_ids"]
        chat = [*case["history"], {"role": case["role"], "content": case["query"]}]
        batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        for name in ("input_ids", "attention_mask", "position_ids"):
            assert batch[name].tolist() == case[name]


def test_continued_turn_of_chatglm3_is_what_the_whole_input_ends_with(roles):
    tokenizer, expected = roles
    template = template_for(tokenizer)
    assert expected["chat_inputs"]
    for case in expected["chat_inputs"]:
        messages = [*map(message, case["history"]), Message(case["role"], case["query"])]
        ids = template.encode_continuation(tokenizer, messages)
        assert case["input_ids"][0][-len(ids) :] == ids
        start = len(template.encode_conversation(tokenizer, messages[:-1])[0]) - 1 if case["history"] else 0
        assert len(ids) == len(case["input_ids"][0]) - start


def test_answers_parsed_as_chatglm3_does(roles):
    """The release returns a tool call as a dictionary; here its name and content are one text."""
    tokenizer, expected = roles
    template = template_for(tokenizer)
    assert isinstance(template, ChatGLM3Template)
    assert expected["process_response"]
    for case in expected["process_response"]:
        written = [item for item in case["history"] if item["role"] == "assistant"]
        assert list(split_messages(case["output"])) == [message(item) for item in written]
        content = case["content"]
        text = content if isinstance(content, str) else f"{content['name']}\n{content['content']}"
        assert template.clean_answer(case["output"]) == text
