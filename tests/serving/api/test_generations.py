"""Every generation behind a real socket: random weights in the shape of each release, and the released code's numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from glmtune.inference.engine.engine import Engine
from glmtune.inference.requests.chat import ChatEngine
from glmtune.inference.requests.sampling import Sampling
from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import build_model, load_official
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.serving.api.state import ServingState
from tests.e2e.conftest import official_config
from tests.serving.api.replies import assert_refused, chat_of, completion_of, stream_of
from tests.serving.api.running_server import RunningServer, serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
FAMILIES = (Family.CHATGLM, Family.CHATGLM2, Family.CODEGEEX2, Family.CHATGLM3, Family.GLM4)
WITH_TOOLS = (Family.CHATGLM3, Family.GLM4)
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


def tokenizer_of(family: Family, tokenizers: dict[str, Any], folder: Path) -> Any:
    return (
        load_tokenizer_folder(folder, family)
        if family is Family.CODEGEEX2  # the pieces of ChatGLM2 under rules of its own
        else tokenizers[family.value]
    )


@pytest.fixture(scope="module", params=FAMILIES)
def generation(
    request: pytest.FixtureRequest, tokenizers: dict[str, Any], tiny_tokenizer_folder: Path
) -> Iterator[RunningServer]:
    """A server over a random model of a generation: nobody's words, but every part of it at work."""
    family: Family = request.param
    tokenizer = tokenizer_of(family, tokenizers, tiny_tokenizer_folder)
    torch.manual_seed(0)
    longest = {"max_sequence_length" if family is Family.CHATGLM else "seq_length": 1024}  # tools are long
    config = official_config(family, tokenizer, "float32") | longest
    model = build_model(native_config(config, family)).float()
    with (
        Engine(model) as engine,
        serving(ServingState(names=(family.value,), chat=ChatEngine(engine, tokenizer))) as server,
    ):
        yield server


def family_of(server: RunningServer) -> Family:
    return server.state.chat.tokenizer.family  # type: ignore[union-attr]


def test_whole_and_streamed_are_the_answer_of_the_engine(generation: RunningServer) -> None:
    chat = generation.state.chat
    assert chat is not None
    messages = [{"role": "user", "content": "你好"}]
    sampling = Sampling(max_new_tokens=12, temperature=0, ignore_eos=True)
    told = list(chat.answer(messages, sampling=sampling))
    text = "".join(getattr(event, "text", "") for event in told)
    whole = chat_of(generation.chat(**GREEDY))
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(chat.prompt_ids(messages)), 12)
    streamed = stream_of(generation.chat(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert streamed.text() == text
    assert streamed.finishes() == ["length"]
    assert streamed.usages[0]["completion_tokens"] == 12


def test_completions_and_the_original_route(generation: RunningServer) -> None:
    whole = completion_of(generation.completion("今天", **GREEDY, logprobs=2))
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.token_logprobs or ()) == 12
    reply = generation.post("/", {"prompt": "你好", "history": [], "max_length": 64})
    assert reply.status_code == 200, reply.text
    assert reply.json()["status"] == 200


def test_tools_are_called_or_refused(generation: RunningServer) -> None:
    if family_of(generation) not in WITH_TOOLS:
        assert "no tools" in assert_refused(generation.chat(**GREEDY, tools=[WEATHER]), param="tools")
        return
    offered = chat_of(generation.chat(**GREEDY, tools=[WEATHER]))
    assert offered.choices[0].finish_reason in ("length", "tool_calls")
    forced = {"tools": [WEATHER], "tool_choice": "required"}
    whole = chat_of(generation.chat(**GREEDY, **forced))
    choice = whole.choices[0]
    asked = [{"role": "user", "content": "你好"}]
    prompt_ids = generation.state.ready().prompt_ids(asked, tools=[WEATHER], call="weather")
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(prompt_ids)
    # What it writes as arguments is chance: a call where they are plain values, else its text.
    assert choice.message.tool_calls or choice.message.content
    streamed = stream_of(generation.chat(**GREEDY, **forced, stream=True))
    calls = [
        call for chunk in streamed.chunks for each in chunk.choices for call in each.delta.tool_calls or ()
    ]
    assert bool(calls) == bool(choice.message.tool_calls)
    assert streamed.text() == (choice.message.content or "")
    assert streamed.finishes() == [choice.finish_reason]


@pytest.mark.parametrize(
    ("name", "family"), [("v2", Family.CHATGLM2), ("glm3", Family.CHATGLM3), ("glm4", Family.GLM4)]
)
def test_numbers_of_the_released_code(
    name: str, family: Family, oracles: Path, tokenizers: dict[str, Any]
) -> None:
    """A prompt of ids is continued with the released code's tokens, each as likely as there."""
    folder = oracles / name
    model = load_official(folder / "checkpoint_safetensors", dtype="float32", device="cpu", family=family)
    with safe_open(folder / "cases.safetensors", "pt") as cases:
        prompt, sequences = (cases.get_tensor(f"generate.{key}") for key in ("input_ids", "sequences"))
        scores = cases.get_tensor("generate.scores")[0].log_softmax(-1)
    said = sequences[0, prompt.shape[1] :].tolist()
    expected = [float(row[token]) for row, token in zip(scores, said, strict=True)]
    with (
        Engine(model) as engine,
        serving(ServingState(names=(name,), chat=ChatEngine(engine, tokenizers[family.value]))) as server,
    ):
        asked = {"temperature": 0, "max_tokens": len(said), "ignore_eos": True, "logprobs": 0}
        reply = server.completion(prompt[0].tolist(), **asked)
        told = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert told == pytest.approx(expected, abs=1e-4)
        streamed = server.completion(prompt[0].tolist(), **asked, stream=True)
        lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"] if choice["logprobs"]]
        assert [each for choice in choices for each in choice["logprobs"]["token_logprobs"]] == told
