"""SERVER_CASES, E: sampling."""

from __future__ import annotations

import pytest

from glmtune.models.chat.defaults import CHAT_DEFAULTS
from tests.serving.api.conftest import GENERATIONS, Scripts
from tests.serving.api.replies import assert_refused, chat_of, completion_of
from tests.serving.api.running_server import RunningServer


def text(server: RunningServer, **fields: object) -> str | None:
    return chat_of(server.chat("写一段广告", max_tokens=12, **fields)).choices[0].message.content


def test_case_36_temperatures(live: RunningServer) -> None:
    greedy = text(live, temperature=0)
    assert greedy
    assert greedy == text(live, temperature=0) == text(live, temperature=1e-5)
    assert text(live, temperature=2.0, seed=1) is not None


@pytest.mark.parametrize(
    "smallest",
    [{"temperature": 5e-324}, {"top_p": 5e-324}, {"min_p": 5e-324}, {"repetition_penalty": 0.01}],
)
def test_case_36_smallest_values(smallest: dict[str, float], live: RunningServer) -> None:
    assert live.chat(**{"temperature": 1, "max_tokens": 4, "seed": 1, **smallest}).status_code == 200


@pytest.mark.parametrize("value", [-1, 1e9, "0.5", True, [], 10**400])
def test_case_36_no_temperatures(value: object, live: RunningServer) -> None:
    assert_refused(live.chat(temperature=value), param="temperature")
    assert_refused(live.completion("x", temperature=value), param="temperature")
    assert text(live, temperature=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0.01),
        ("top_k", -2),
        ("top_k", "5"),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", 5e-324),  # logits divided by it are infinite, which once failed all requests
        ("repetition_penalty", 10.5),
        ("seed", 1.5),
        ("seed", 2**63),
        ("n", "2"),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", "x" * 2000),
        ("stop", ["x"] * 100),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", [5]),
        ("stream", "yes"),
        ("ignore_eos", 1),
        ("prefix_strength", -1),
    ],
)
def test_case_36_values_out_of_range(name: str, value: object, live: RunningServer) -> None:
    assert f"`{name}`" in assert_refused(live.chat(**{name: value}), param=name)
    assert f"`{name}`" in assert_refused(live.completion("x", **{name: value}), param=name)


def test_case_37_fields_reach_the_engine(scripts: Scripts) -> None:
    server = scripts.start("好")
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "stop": ["x"],
        "ignore_eos": True,
    }
    for reply in (server.chat(logit_bias={"5": -100}, seed=3, max_tokens=9, **fields),
                  server.completion("x", logit_bias={"5": -100}, seed=3, max_tokens=9, **fields)):  # fmt: skip
        assert reply.status_code == 200
        sampling = server.state.chat.engine.requests[-1].sampling
        assert {name: getattr(sampling, name) for name in fields} == {**fields, "stop": ("x",)}
        assert (sampling.logit_bias, sampling.seed, sampling.max_new_tokens) == ({5: -100.0}, 3, 9)
    assert server.chat(top_k=-1).status_code == 200
    assert server.state.chat.engine.requests[-1].sampling.top_k == 0
    assert server.chat(n=3, seed=-1).status_code == 200
    assert [each.sampling.seed for each in server.state.chat.engine.requests[-3:]] == [2**63 - 1, 0, 1]


def test_case_37_penalties_act(live: RunningServer) -> None:
    plain = text(live, temperature=0)
    assert plain is not None
    first = live.state.chat.tokenizer.text_ids("晚")[-1]  # type: ignore[union-attr]
    assert text(live, temperature=0, logit_bias={str(first): -100}) != plain
    assert text(live, temperature=0, repetition_penalty=5.0) != plain


def test_seeds_repeat(live: RunningServer) -> None:
    fields = {"temperature": 2.0, "top_p": 1}
    assert text(live, seed=5, **fields) == text(live, seed=5, **fields) != text(live, seed=6, **fields)
    two = chat_of(live.chat("写一段广告", max_tokens=12, n=2, seed=5, **fields))
    assert [choice.message.content for choice in two.choices] == [
        text(live, seed=5, **fields),
        text(live, seed=6, **fields),
    ]


@pytest.mark.parametrize("family", GENERATIONS)
def test_case_38_nothing_said_is_the_release_s_own(family: str, scripts: Scripts) -> None:
    server = scripts.start("好", family)
    defaults = CHAT_DEFAULTS[scripts.tokenizers[family].family]
    chat_of(server.chat(temperature=None))
    completion_of(server.completion("x"))
    for request in server.state.chat.engine.requests:
        assert (request.sampling.temperature, request.sampling.top_p) == (
            defaults.temperature,
            defaults.top_p,
        )
        assert not request.sampling.is_greedy
