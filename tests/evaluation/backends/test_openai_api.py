"""The OpenAI-compatible backend against a local server."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import pytest

from evaluation.backend import Drawing, Limits
from evaluation.backends.endpoint import EndpointSettings
from evaluation.backends.openai_api import OpenAIBackend
from evaluation.backends.openai_replies import UNLISTED_LOGPROB, read_completion, read_scores
from evaluation.running.runner import run_task
from evaluation.sample import Prompt
from glmtune.errors import ConfigError, GlmtuneError
from glmtune.http_client.server_address import read_address
from glmtune.messages import Message
from tests.evaluation.backends.openai_server import serve
from tests.evaluation.doubles import make_task

PROMPTS = [Prompt(text=f"question {place}") for place in range(12)]
CHATS = [
    Prompt(turns=(Message("system", "Be brief."), Message("user", f"question {place}"))) for place in range(5)
]


def completion(text, reason="stop", **choice):
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"choices": [{"text": text, "finish_reason": reason, **choice}], "usage": usage}


def chat(text, reason="stop", **message):
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": reason}], "usage": {}}


def echo(path, body):
    return 200, completion(f"answer to {body['prompt']}")


def backend(server, **settings):
    defaults = {"first_wait_seconds": 0.01, "max_retries": 3, "concurrency": 4}
    return OpenAIBackend(EndpointSettings(base_url=server.url, **{**defaults, **settings}))


def test_text_goes_to_completions_and_comes_back_in_place():
    with serve(echo) as server:
        answers = dict(backend(server).generate(PROMPTS, Limits(20, ("\nQ:", "V", "X", "Y", "Z"))))
    assert {place: answer.text for place, answer in answers.items()} == {
        place: f"answer to question {place}" for place in range(12)
    }
    assert (answers[0].stop_reason, answers[0].num_prompt_tokens, answers[0].num_new_tokens) == ("eos", 7, 3)
    path, body = server.requests[0]
    assert path == "/v1/completions"
    assert body["temperature"] == 0
    assert body["max_tokens"] == 20
    assert body["model"] == "m"
    assert body["stop"] == ["\nQ:", "V", "X", "Y"]


def test_turns_go_to_chat_completions():
    with serve(lambda path, body: (200, chat(body["messages"][-1]["content"], "length"))) as server:
        answers = dict(backend(server).generate(CHATS, Limits(20)))
    assert [answers[place].text for place in range(5)] == [f"question {place}" for place in range(5)]
    assert answers[0].stop_reason == "length"
    path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert "stop" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("drawing", "fields"),
    [
        (Drawing(0.8), {"temperature": 0.8, "seed": 7}),
        (Drawing(1.2, top_p=0.9, top_k=40), {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "seed": 7}),
    ],
    ids=["temperature", "all"],
)
def test_drawn_answers_have_a_seed_each_and_no_field_that_says_nothing(drawing, fields):
    prompts = [Prompt(text="question 0", seed=7)]
    with serve(echo) as server:
        list(backend(server).generate(prompts, Limits(20, drawing=drawing)))
    _, body = server.requests[0]
    sampling = ("temperature", "top_p", "top_k", "seed")
    assert {name: body[name] for name in sampling if name in body} == fields


def test_requests_run_side_by_side_and_no_more_than_allowed():
    def slow(path, body):
        time.sleep(0.05)
        return echo(path, body)

    with serve(slow) as server:
        list(backend(server, concurrency=3).generate(PROMPTS, Limits(4)))
        assert server.most_at_once == 3


@pytest.mark.parametrize("busy", [(429, {}), (503, "not JSON"), (500, {"error": "x"}), (200, "half a line{")])
def test_a_busy_server_is_asked_again(busy, caplog):
    with serve(echo, queue=[busy, busy]) as server, caplog.at_level(logging.WARNING):
        answers = dict(backend(server, concurrency=1).generate(PROMPTS[:1], Limits(4)))
    assert answers[0].text == "answer to question 0"
    assert len(server.requests) == 3
    assert "next attempt in" in caplog.text


def test_the_server_may_say_how_long_to_wait():
    with serve(echo, queue=[(429, {}, {"Retry-After": "0.3"})]) as server:
        began = time.perf_counter()
        list(backend(server).generate(PROMPTS[:1], Limits(4)))
    assert time.perf_counter() - began >= 0.3


def test_a_question_at_which_a_server_stays_busy_has_failed():
    with serve(lambda path, body: (503, {"error": {"message": "overloaded"}})) as server:
        [(place, failed)] = backend(server).generate(PROMPTS[:1], Limits(4))
    assert place == 0
    assert "no answer in 4 attempts, the last time: HTTP 503: overloaded." in failed.reason


def test_a_server_out_of_reach_is_an_error_at_once():
    with pytest.raises(
        GlmtuneError, match=r"127\.0\.0\.1:9/v1/models gave no answer: .*\(Connection refused\)"
    ):
        OpenAIBackend(EndpointSettings(base_url="http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(("status", "words"), [(401, "api_key_env"), (404, "endpoint.base_url")])
def test_a_refusal_that_meets_every_question_stops_the_run(status, words):
    def reply(path, body):
        if body["prompt"] == "question 5":
            return status, {"error": {"message": "too long"}}
        return echo(path, body)

    answered = []
    with serve(reply) as server:
        with pytest.raises(GlmtuneError, match=words):
            answered.extend(backend(server, concurrency=2).generate(PROMPTS, Limits(4)))
        assert sum(body["prompt"] == "question 5" for _, body in server.requests) == 1
        assert len(server.requests) < 12  # nothing more is sent after it
    assert all(answer.text == f"answer to question {place}" for place, answer in answered)


@pytest.mark.parametrize(
    "withheld",
    [chat(None), chat("I cannot", "content_filter"), chat("", refusal="against the rules")],
)
def test_a_withheld_answer_is_an_error(withheld):
    with pytest.raises(GlmtuneError, match=r"withheld an answer.*must not be scored as wrong"):
        read_completion(withheld, ())


def test_stop_strings_are_cut_here_too():
    made = read_completion(completion("yes\nQ: more"), ("\nQ:",))
    assert (made.text, made.stop_reason) == ("yes", "stop")
    assert read_completion(completion("yes", stop_reason="\nQ:"), ("\nQ:",)).stop_reason == "stop"
    assert read_completion(completion("yes", "length"), ()).stop_reason == "length"


def test_choices_of_text_are_scored():
    listed = {" A": -0.5, " B": -1.5, "A": -4.0, "C": -2.5, "x": -3.0}

    def reply(path, body):
        assert body["logprobs"] == 20
        assert body["max_tokens"] == 1
        return 200, completion(" A", "length", logprobs={"top_logprobs": [listed]})

    with serve(reply) as server:
        scores = dict(backend(server).score_choices(PROMPTS, (" A", " B", " C", " D")))
    assert sorted(scores) == list(range(12))
    assert scores[3].logprobs == (-0.5, -1.5, -2.5, UNLISTED_LOGPROB)
    assert scores[3].best == 0


def test_choices_of_a_chat_are_scored():
    top = [{"token": "▁B", "logprob": -0.1}, {"token": "A", "logprob": -2.0}]

    def reply(path, body):
        assert body["logprobs"] is True
        assert body["top_logprobs"] == 8
        answer = chat("B")
        answer["choices"][0]["logprobs"] = {"content": [{"token": "B", "top_logprobs": top}]}
        return 200, answer

    with serve(reply) as server:
        scores = dict(backend(server, top_logprobs=8).score_choices(CHATS[:1], ("A", "B")))
    assert scores[0].logprobs == (-2.0, -0.1)


def test_no_logprobs_is_an_error_that_names_the_way_out():
    with pytest.raises(GlmtuneError, match=r"no log-probabilities.*'A', 'B'.*protocol=few_shot_cot"):
        read_scores(completion("A"), ("A", "B"))
    listed = {"top_logprobs": [{"x": -0.1, "y": -3.0}]}
    with pytest.raises(GlmtuneError, match=r"None of the choices 'A', 'B'.*2 likeliest.*\"x\", \"y\""):
        read_scores(completion("x", logprobs=listed), ("A", "B"))


def test_the_start_of_a_chat_takes_the_likelier_form_and_text_the_exact_one():
    answer = completion("x", logprobs={"top_logprobs": [{"▁A": -0.5, "A": -4.0, "▁B": -3.0, "B": -2.0}]})
    assert read_scores(answer, ("A", "B"), is_chat=True).logprobs == (-0.5, -2.0)
    assert read_scores(answer, ("A", "B")).logprobs == (-4.0, -2.0)


def test_an_answer_of_another_interface_is_an_error():
    with pytest.raises(GlmtuneError, match=r"no `choices`.*hello"):
        read_completion({"hello": 1}, ())


def test_the_model_and_its_context_come_from_the_server(monkeypatch):
    monkeypatch.setenv("MY_KEY", "abc")
    with serve(echo) as server:
        asked = backend(server, api_key_env="MY_KEY")
        assert asked.max_context_tokens == 512
        assert (asked.identity.name, asked.identity.engine, asked.identity.is_chat) == ("m", "openai", True)
        assert server.headers[0]["Authorization"] == "Bearer abc"
        assert backend(server, max_context_tokens=64, is_chat=False).max_context_tokens == 64
        assert asked.count_tokens(PROMPTS[0]) > 0
        assert asked.count_tokens(Prompt(text="word " * 500)) >= 1000


def test_an_unknown_model_and_an_unknown_context_are_errors():
    with serve(echo, models=[{"id": "m"}]) as server:
        with pytest.raises(ConfigError, match=r"`endpoint\.model` is `other`, but .* serves m"):
            backend(server, model="other")
        with pytest.raises(
            ConfigError, match=r"how long the context of `m` is.*endpoint\.max_context_tokens"
        ):
            backend(server)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"`endpoint\.base_url` is `localhost:8000`, but it must start"):
        EndpointSettings(base_url="localhost:8000")
    with pytest.raises(ConfigError, match=r"`endpoint\.concurrency` is 0, but it must be at least 1"):
        EndpointSettings(concurrency=0)


def test_stopping_early_stops_asking():
    with serve(echo) as server:
        answers = backend(server, concurrency=2).generate(PROMPTS, Limits(4))
        next(answers)
        answers.close()
        time.sleep(0.1)
        assert len(server.requests) <= 4


def test_a_notebook_whose_loop_is_running_can_ask_too():
    async def cell(server):
        return dict(backend(server).generate(PROMPTS, Limits(4)))

    with serve(echo) as server:
        answers = asyncio.run(cell(server))
    assert [answers[place].text for place in (0, 11)] == ["answer to question 0", "answer to question 11"]


def test_half_a_surrogate_pair_in_an_answer_is_asked_about_and_kept(tmp_path):
    def reply(path, body):
        if path.endswith("/chat/completions"):
            answer = chat("A")
            answer["choices"][0]["logprobs"] = {
                "content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": -1}]}]
            }
            return 200, answer
        return 200, completion("cut \ud83d")

    task = make_task("generate_then_choices", sizes={"law": 2})
    with serve(reply) as server:
        finished = run_task(task, backend(server), tmp_path)
        assert "\\ud83d" in json.dumps(server.requests[-1])
    assert [answer.completion for answer in finished.answers] == ["cut \ud83d"] * 2
    with serve(reply) as server:
        assert run_task(task, backend(server, server_name="x"), tmp_path / "b").num_resumed == 0


def test_a_list_of_models_may_hold_odd_entries():
    with serve(echo, models=[{"name": "x"}, 5, {"id": "m", "max_model_len": "512"}]) as server:
        assert backend(server).max_context_tokens == 512


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://LocalHost:80/v1/", "http://localhost/v1"),
        ("https://Host.example.:443", "https://host.example"),
        ("http://user:pw@host:8000/v1?key=abc", "http://host:8000/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_one_server_has_one_address_without_secrets(url, shown):
    assert read_address(url).shown == shown
    assert read_address(url).url("models").startswith(f"{shown}/models")


KNOWN = {"model": "m", "max_context_tokens": 2048}


@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_a_server_without_a_list_of_models(status):
    with serve(echo, models_status=status) as server:
        asked = backend(server, **KNOWN)
        assert (asked.identity.name, asked.max_context_tokens) == ("m", 2048)
        assert f"HTTP {status}" in asked.notes[0]
        assert "Not checked: whether `m` is served" in asked.notes[0]
        assert dict(asked.generate(PROMPTS[:1], Limits(5)))[0].text == "answer to question 0"
        for settings in ({}, {"model": "m"}, {"max_context_tokens": 2048}):
            with pytest.raises(GlmtuneError, match=r"`endpoint.model` and `endpoint.max_context_tokens`"):
                backend(server, **settings)


def test_an_empty_list_of_models_and_one_of_another_form():
    with serve(echo, models=[]) as server:
        assert "lists no model" in backend(server, **KNOWN).notes[0]
    with serve(echo, models="none") as server:
        assert "gives no list of models" in backend(server, **KNOWN).notes[0]


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_wrong_is_no_missing_list(status):
    with serve(echo, models_status=status) as server, pytest.raises(GlmtuneError, match="api_key_env"):
        backend(server, **KNOWN)


def test_a_list_without_the_model_is_believed():
    with serve(echo, models=[{"id": "other"}]) as server, pytest.raises(ConfigError, match="serves other"):
        backend(server, **KNOWN)
    with serve(echo) as server:
        assert backend(server, **KNOWN).notes == ()
