"""A model that an engine runs refuses to compute for anyone else, and works again afterwards."""

from __future__ import annotations

import pytest

from glmtune.errors import ConfigError
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.chat.held import hold_model, is_held, release_model

GREEDY = {"do_sample": False, "max_new_tokens": 4}


def test_a_held_model_refuses() -> None:
    model, tokenizer = load_model("glm-tiny", device="cpu"), load_tokenizer("glm-tiny")
    expected, _ = model.chat(tokenizer, "你好", **GREEDY)
    inputs = model.build_inputs(tokenizer, "你好")
    running = model.stream_chat(tokenizer, "你好", **GREEDY)
    next(running)
    hold_model(model)
    assert is_held(model)
    calls = {
        "model.chat": lambda: model.chat(tokenizer, "你好", **GREEDY),
        "model.stream_chat": lambda: next(model.stream_chat(tokenizer, "你好", **GREEDY)),
        "model.generate": lambda: model.generate(**inputs, **GREEDY),
        "model.quantize": lambda: model.quantize(8),
        "model.to": lambda: model.to("cpu"),
    }
    for name, call in calls.items():
        with pytest.raises(ConfigError, match=rf"`{name}` cannot run: an engine runs this model"):
            call()
    with pytest.raises(ConfigError, match=r"`model.stream_chat` cannot run"):
        next(running)
    release_model(model)
    assert model.chat(tokenizer, "你好", **GREEDY)[0] == expected
