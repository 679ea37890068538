"""SERVER_CASES, G: models and adapters; and I: the original ``POST /``."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai.types import Model

from glmtune.inference.requests.engine_state import AdapterInfo
from tests.serving.api.conftest import GENERATIONS, WITH_TOOLS, Scripts
from tests.serving.api.replies import assert_refused, chat_of, completion_of, stream_of
from tests.serving.api.running_server import RunningServer


def held(name: str, kind: Any, num_tokens: int = 0) -> AdapterInfo:
    return AdapterInfo(name=name, kind=kind, path="/secret/path", content_hash="0", num_tokens=num_tokens)


@pytest.fixture
def tuned(scripts: Scripts) -> RunningServer:
    server = scripts.start("好", context=64)
    server.state.names = ("chatglm2-6b", "zai-org/chatglm2-6b")
    server.state.chat.engine.adapters = (held("ads", "prefix", 8), held("shop", "lora"))
    return server


def test_case_42_unknown_model(tuned: RunningServer) -> None:
    message = assert_refused(tuned.chat(model="chatglm2_6b"), 404, "model", "model_not_found")
    assert "Did you mean `chatglm2-6b`" in message
    assert "`ads`" in message
    assert_refused(tuned.completion("x", model="gpt-4"), 404, "model", "model_not_found")
    assert_refused(tuned.get("/v1/models/adz"), 404, "model", "model_not_found")
    assert_refused(tuned.chat(model=7), param="model")
    assert tuned.state.chat.engine.requests == []


def test_case_42_list(tuned: RunningServer) -> None:
    found = tuned.get("/v1/models").json()
    assert found["object"] == "list"
    assert {card["id"]: card["parent"] for card in found["data"]} == {
        "chatglm2-6b": None,
        "zai-org/chatglm2-6b": None,
        "ads": "chatglm2-6b",
        "shop": "chatglm2-6b",
    }
    for card in found["data"]:
        Model.model_validate(card, strict=True)
        assert card["max_model_len"] == 64
        assert tuned.get(f"/v1/models/{card['id']}").json() == card
        assert "secret" not in json.dumps(card)
    assert [model.id for model in tuned.openai.models.list()] == [card["id"] for card in found["data"]]


@pytest.mark.parametrize("name", ["chatglm2-6b", "zai-org/chatglm2-6b", "ads", "shop"])
def test_case_42_the_name_asked_for_comes_back(name: str, tuned: RunningServer) -> None:
    assert chat_of(tuned.chat(model=name)).model == name
    assert {chunk.model for chunk in stream_of(tuned.chat(model=name, stream=True)).chunks} == {name}
    assert completion_of(tuned.completion("x", model=name)).model == name
    adapter = name if name in ("ads", "shop") else ""
    assert {request.adapter for request in tuned.state.chat.engine.requests} == {adapter}


def test_no_name_asks_the_default(tuned: RunningServer) -> None:
    assert chat_of(tuned.chat()).model == "chatglm2-6b"
    tuned.state.default_model = "ads"
    assert chat_of(tuned.chat()).model == "ads"
    tuned.post("/", {"prompt": "x"})
    assert [request.adapter for request in tuned.state.chat.engine.requests] == ["", "ads", "ads"]


def test_scale_of_a_lora(tuned: RunningServer) -> None:
    for scale in (0, 0.5, 2):
        assert tuned.chat(model="shop", adapter_scale=scale).status_code == 200
        assert tuned.state.chat.engine.requests[-1].strength == scale
        assert tuned.completion("x", model="shop", adapter_scale=scale).status_code == 200
        assert tuned.state.chat.engine.requests[-1].strength == scale
    for name in ("ads", "chatglm2-6b"):
        assert_refused(tuned.chat(model=name, adapter_scale=0.5), param="adapter_scale")
    assert_refused(tuned.chat(model="shop", adapter_scale=-1), param="adapter_scale")


def test_strength_of_a_prefix(tuned: RunningServer) -> None:
    for strength in (0, 0.5, 2):
        assert tuned.chat(model="ads", prefix_strength=strength).status_code == 200
        assert tuned.state.chat.engine.requests[-1].strength == strength
        assert tuned.completion("x", model="ads", prefix_strength=strength).status_code == 200
        assert tuned.state.chat.engine.requests[-1].strength == strength
    for name in ("shop", "chatglm2-6b"):
        assert_refused(tuned.chat(model=name, prefix_strength=0.5), param="prefix_strength")


@pytest.mark.parametrize(
    "body",
    [b'{"prompt": "\xe4\xbd\xa0\xe5\xa5\xbd", "history": []}', b'{"prompt": "\xe4\xbd\xa0\xe5\xa5\xbd"}'],
)
@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", ""])
def test_case_60_the_official_call(body: bytes, kind: str, scripts: Scripts) -> None:
    server = scripts.start("早点休息")
    reply = server.post("/", content=body, headers={"content-type": kind})
    assert reply.status_code == 200
    found = reply.json()
    assert list(found) == ["response", "history", "status", "time"]
    assert (found["response"], found["history"], found["status"]) == ("早点休息", [["你好", "早点休息"]], 200)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", found["time"])


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        dict.fromkeys(("max_length", "top_p", "temperature")),
        dict.fromkeys(("max_length", "top_p", "temperature"), 0),
    ],
)
@pytest.mark.parametrize("family", GENERATIONS)
def test_case_60_defaults(family: str, nothing: dict[str, Any], scripts: Scripts) -> None:
    server = scripts.start("好", family)
    assert server.post("/", {"prompt": "你好", "history": None, **nothing}).status_code == 200
    request = server.state.chat.engine.requests[0]
    assert (request.sampling.top_p, request.sampling.temperature) == (0.7, 0.95)
    assert request.sampling.max_new_tokens == 2048 - len(request.prompt_ids)


@pytest.mark.parametrize("family", GENERATIONS)
def test_case_60_both_forms_of_history(family: str, scripts: Scripts) -> None:
    server = scripts.start("好", family)
    prompts = []
    pairs = [["早", "点"]]
    messages = [{"role": "user", "content": "早"}, {"role": "assistant", "metadata": "", "content": "点"}]
    for history in (pairs, messages):
        found = server.post("/", {"prompt": "你好", "history": history}).json()
        assert found["history"][: len(history)] == history
        prompts.append(server.state.chat.engine.requests[-1].prompt_ids)
        again = server.post("/", {"prompt": "再见", "history": found["history"]})
        assert again.status_code == 200
    assert (
        prompts[0]
        == prompts[1]
        == server.state.chat.prompt_ids(
            [
                {"role": "user", "content": "早"},
                {"role": "assistant", "content": "点"},
                {"role": "user", "content": "你好"},
            ]
        )
    )
    empty = server.post("/", {"prompt": "你好"}).json()["history"]
    assert isinstance(empty[0], dict) == (family in WITH_TOOLS)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x", "history": "y"}, "history"),
        ({"prompt": "x", "history": [["a"]]}, "history"),
        ({"prompt": "x", "history": [{"role": "robot", "content": "y"}]}, "history"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "top_p": 1.5}, "top_p"),
        ({"prompt": "x", "max_length": -1}, "max_length"),
        ({"prompt": "x", "max_length": 3}, "max_length"),
        ({"prompt": "x", "num_beams": 4}, "num_beams"),
    ],
)
def test_case_60_wrong_bodies(body: dict[str, Any], param: str, scripts: Scripts) -> None:
    assert_refused(scripts.start("好").post("/", body), param=param)
