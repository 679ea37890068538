"""Thoughts, text and calls in what the models of folders in transformers' format write, in pieces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from glmtune.inference.requests.answer_events import CallDelta, CallStart, Finished, TextDelta, ThoughtDelta
from glmtune.inference.requests.answer_reader import AnswerReader
from glmtune.inference.requests.chat import ChatEngine
from glmtune.inference.requests.sampling import Sampling
from glmtune.models.releases.families import Family
from glmtune.models.templates.responses import process_response
from tests.inference.requests.scripted import ScriptedEngine
from tests.models.templates.chat_folders import FORMS, chat_tokenizer

CALL = 'clock\n{"zone": "北京", "note": "</think> }"}'
CLOCK = {"type": "function", "function": {"name": "clock", "description": "time", "parameters": {}}}
USER = {"role": "user", "content": "How many?"}
TEXTS = [
    "<think>\n2 and 2\n</think>\nFour.",
    "\nFour.\nlegs ",
    f"<think>2</think>\n{CALL}",
    CALL,
    f"\n{CALL}",
    "<think>never closed",
    "<think></think>\n\n\nHello\nWorld",
    f"<think>a</think>Let me see.<|assistant|>{CALL}",
    "<think>a</think>b<|assistant|>\n c",
]


def read(text: str, *, has_tools: bool, seed: int, **options: Any) -> tuple[str, str, list[list[str]]]:
    reader, rng = AnswerReader(Family.TRANSFORMERS, has_tools=has_tools, **options), random.Random(seed)
    deltas: list[Any] = []
    while text:
        num = rng.randrange(1, 5)
        deltas += reader.feed(text[:num])
        text = text[num:]
    deltas += reader.finish(is_cut=False)
    thoughts = "".join(each.thoughts for each in deltas if isinstance(each, ThoughtDelta))
    said = "".join(each.text for each in deltas if isinstance(each, TextDelta))
    calls: list[list[str]] = []
    for each in deltas:
        if isinstance(each, CallStart):
            calls.append([each.name, ""])
        elif isinstance(each, CallDelta):
            calls[each.index][1] += each.arguments
    return thoughts, said, calls


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("has_tools", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_read_as_the_whole_answer(text: str, has_tools: bool, seed: int) -> None:
    whole = process_response(Family.TRANSFORMERS, text, tools_announced=has_tools)
    thoughts, said, calls = read(text, has_tools=has_tools, seed=seed)
    assert thoughts == whole.thoughts
    texts = [each.content for each in whole.messages if not each.metadata and each.content]
    assert said == "\n".join(texts)
    assert calls == [[each.metadata, each.content] for each in whole.messages if each.metadata]


def test_the_prompt_may_have_opened_thoughts_or_a_call() -> None:
    assert read("\n2\n</think>\n4", has_tools=False, seed=0, opening="<think>") == ("2", "4", [])
    assert read("cut", has_tools=False, seed=0, opening="<think>") == ("cut", "", [])
    assert read('{"a": 1}', has_tools=True, seed=0, call="clock") == ("", "", [["clock", '{"a": 1}']])
    assert read(" on <think>", has_tools=False, seed=0, goes_on=True) == ("", " on <think>", [])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("folders")
    return {form: chat_tokenizer(folder / form, FORMS[form]) for form in ("roles", "edge", "thinking-tools")}


def events(tokenizer: Any, text: str, *, end: str = "", **options: Any) -> tuple[ChatEngine, list[Any]]:
    ids = [*tokenizer.text_ids(text), tokenizer.get_command(end) if end else tokenizer.end_id]
    chat = ChatEngine(ScriptedEngine(ids), tokenizer)
    return chat, list(chat.answer([USER], **options))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("roles", "\n<think>\n2 and 2\n</think>\n四 legs"),
        ("edge", "<think>\n2 and 2\n</think>\n四 legs"),
        ("thinking-tools", "\n2 and 2\n</think>\n四 legs"),
    ],
)
def test_an_engine_tells_thoughts_first(form: str, text: str, tokenizers: dict[str, Any]) -> None:
    sampling = Sampling(logprobs=0)
    chat, found = events(tokenizers[form], text, sampling=sampling)
    kinds = [type(each) for each in found]
    first_text = kinds.index(TextDelta)
    assert set(kinds[:first_text]) == {ThoughtDelta}
    assert "".join(each.thoughts for each in found if isinstance(each, ThoughtDelta)) == "2 and 2"
    assert "".join(each.text for each in found if isinstance(each, TextDelta)) == "四 legs"
    entries = [entry for each in found[:-1] for entry in each.logprobs]
    assert [each.token_id for each in entries] == tokenizers[form].text_ids(text)
    finished = found[-1]
    assert isinstance(finished, Finished)
    assert chat.messages_for_history(finished) == [
        {"role": "assistant", "content": "四 legs", "reasoning_content": "2 and 2"}
    ]


def test_a_history_of_calls(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["thinking-tools"]
    called = 'clock\n{"zone": "北京"}'
    chat, found = events(tokenizer, f"\n2\n</think>\n{called}", end="<|observation|>", tools=[CLOCK])
    assert found[-1].reason == "tool_calls"
    name, arguments = called.split("\n")
    (message,) = chat.messages_for_history(found[-1])
    assert message == {
        "role": "assistant", "content": arguments, "metadata": name, "reasoning_content": "2",
    }  # fmt: skip
    ids = chat.prompt_ids([USER, message, {"role": "tool", "content": "10:00"}], tools=[CLOCK])
    assert f"<|assistant|>{called}<|observation|>\n10:00<|assistant|>" in tokenizer.decode(ids)


def test_a_history_of_an_answer_that_went_on(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["thinking-tools"]
    chat = ChatEngine(ScriptedEngine([*tokenizer.text_ids(" legs"), tokenizer.end_id]), tokenizer)
    asked = [USER, {"role": "assistant", "content": "Four"}]
    *_, finished = chat.answer(asked, continues=True)
    assert chat.messages_for_history(finished) == [{"role": "assistant", "content": "legs"}]


def test_a_call_that_the_prompt_begins(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizers["thinking-tools"]
    ids = [*tokenizer.text_ids('{"zone": 8}'), tokenizer.get_command("<|observation|>")]
    chat = ChatEngine(ScriptedEngine(ids), tokenizer)
    found = list(chat.answer([USER], tools=[CLOCK], call="clock"))
    assert found[0] == CallStart(0, "clock")
    assert found[-1].reason == "tool_calls"
    assert chat.messages_for_history(found[-1]) == [
        {"role": "assistant", "content": '{"zone": 8}', "metadata": "clock"}
    ]


def test_a_stop_text_ends_thoughts_too(tokenizers: dict[str, Any]) -> None:
    _, found = events(
        tokenizers["thinking-tools"], "\n2 and 2\n</think>\n4", sampling=Sampling(stop=(" and",))
    )
    assert [each.thoughts for each in found[:-1]] == ["2"]
    assert isinstance(found[0], ThoughtDelta)
    assert found[-1].reason == "stop"
