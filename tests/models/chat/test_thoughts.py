"""`chat` and `stream_chat` of a folder in transformers' format whose model thinks first."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from glmtune.errors import ConfigError, DataError
from glmtune.loading import load_model, load_tokenizer
from tests.models.transformers_folders import make_folder

TOOL = {"name": "clock", "description": "time", "parameters": {}}


class Script(LogitsProcessor):
    """Makes a model write given tokens."""

    def __init__(self, *token_ids: int) -> None:
        self.waiting = list(token_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.waiting.pop(0)] = 0.0
        return forced


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    folder = tmp_path_factory.mktemp("models")
    places = {kind: make_folder(folder / kind, kind) for kind in ("glm-z1", "glm", "glm-edge")}
    return {
        kind: (load_model(str(place), device="cpu"), load_tokenizer(str(place)))
        for kind, place in places.items()
    }


def says(tokenizer: Any, text: str) -> dict[str, Any]:
    """Settings with which a model writes a text and ends."""
    ids = [*tokenizer.text_ids(text), tokenizer.end_id]
    return {"logits_processor": LogitsProcessorList([Script(*ids)]), "do_sample": False}


def test_chat_answers_without_thoughts(loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded["glm-z1"]
    response, history = model.chat(tokenizer, "How many?", **says(tokenizer, "\n2 and 2\n</think>\nFour."))
    assert response == "Four."
    assert history == [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "metadata": "", "content": "Four.", "reasoning_content": "2 and 2"},
    ]
    response, history = model.chat(tokenizer, "So?", history, **says(tokenizer, "\n</think>\nYes."))
    assert response == "Yes."
    assert "reasoning_content" not in history[-1]
    assert len(history) == 4


def test_earlier_thoughts_are_not_read_again(
    loaded: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded["glm-z1"]
    _, history = model.chat(tokenizer, "How many?", **says(tokenizer, "\nsecret\n</think>\nFour."))
    seen: list[str] = []
    original = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **given: (seen.append(tokenizer.decode(given["input_ids"][0])), original(**given))[1],
    )
    model.chat(tokenizer, "So?", history, **says(tokenizer, "</think>Yes."))
    assert "secret" not in seen[0]
    assert seen[0].endswith("<|assistant|>\nFour.<|user|>\nSo?<|assistant|>\n<think>")


def test_a_stream_hands_out_thoughts_beside_the_answer(loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded["glm-z1"]
    steps = list(model.stream_chat(tokenizer, "How many?", **says(tokenizer, "\n2 and\n</think>\nFour.")))
    assert [response for response, _ in steps][-1] == "Four."
    thinking = [history[-1] for response, history in steps if not response]
    assert thinking[-1]["reasoning_content"] == "2 and"
    answers = [response for response, _ in steps]
    assert all(b.startswith(a) for a, b in itertools.pairwise(answers))
    assert steps[-1][1][-1]["reasoning_content"] == "2 and"
    with pytest.raises(DataError, match="renders earlier answers anew"):
        _continued(model, tokenizer)


def _continued(model: Any, tokenizer: Any) -> None:
    *_, (_, history, cache) = model.stream_chat(
        tokenizer, "How many?", return_past_key_values=True, **says(tokenizer, "</think>Four.")
    )
    list(model.stream_chat(tokenizer, "So?", history, past_key_values=cache))


@pytest.mark.parametrize(("kind", "said"), [("glm", "\nFour."), ("glm-edge", "Four.")])
def test_a_cache_is_gone_on_with(kind: str, said: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded[kind]
    *_, (response, history, cache) = model.stream_chat(
        tokenizer, "How many?", return_past_key_values=True, **says(tokenizer, said)
    )
    assert response == "Four."
    *_, (response, _, cache) = model.stream_chat(
        tokenizer,
        "So?",
        history,
        past_key_values=cache,
        return_past_key_values=True,
        **says(tokenizer, said),
    )
    assert response == "Four."
    talk = [*history, {"role": "user", "content": "So?"}]
    expected = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert cache.token_ids == [*expected, *tokenizer.text_ids(said)]


def test_pairs_are_taken_as_well(loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded["glm"]
    response, history = model.chat(tokenizer, "So?", [("1", "2")], **says(tokenizer, "\nYes."))
    assert response == "Yes."
    assert history[0] == ("1", "2")


def test_calls_are_read(loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded["glm"]
    system = {"role": "system", "content": "", "tools": [TOOL]}
    response, history = model.chat(tokenizer, "Late?", [system], **says(tokenizer, 'clock\n{"zone": 8}'))
    assert response == {"name": "clock", "parameters": {"zone": 8}}
    response, history = model.chat(
        tokenizer, "10:00", history, role="observation", **says(tokenizer, "\nTen.")
    )
    assert response == "Ten."
    assert [turn["role"] for turn in history] == ["system", "user", "assistant", "observation", "assistant"]
    response, _ = model.chat(tokenizer, "Late?", **says(tokenizer, 'clock\n{"zone": 8}'))
    assert response == 'clock\n{"zone": 8}'


def test_a_stop_text_is_kept_in_the_answer(loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded["glm-z1"]
    response, _ = model.chat(
        tokenizer, "How?", stop_strings="Four", **says(tokenizer, "\n2\n</think>\nFour legs")
    )
    assert response == "Four"
    with pytest.raises(ConfigError, match="eos_token_id"):
        model.chat(tokenizer, "How?", eos_token_id=3)
