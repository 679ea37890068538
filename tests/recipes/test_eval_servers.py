"""`glmtune eval backend=openai`: what answered names the run, and what did not answer is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from recipes.eval import FAILED_QUESTIONS
from tests.evaluation.backends.openai_server import serve

pytestmark = pytest.mark.usefixtures("own_folder")


def saying(text):
    def reply(path, body):
        top = [{"token": letter, "logprob": -1.0 - place} for place, letter in enumerate("ABCD")]
        logprobs = {"content": [{"token": "A", "top_logprobs": top}]}
        choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": logprobs}
        return 200, {"choices": [choice], "usage": {}}

    return reply


def evaluate(server, *words, benchmark="mmlu") -> int:
    common = [f"benchmark={benchmark}", "benchmark.data_dir=sample", "benchmark.limit=1", "backend=openai"]
    quick = ["endpoint.first_wait_seconds=0.01", "endpoint.max_retries=1"]
    return main(["eval", *common, *quick, f"endpoint.base_url={server.url}", *words])


def folders():
    return sorted(path for path in Path("runs/eval").iterdir())


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


MODEL = {"id": "m", "root": "/models/a", "owned_by": "vllm", "max_model_len": 4096}


def test_two_servers_of_one_name_are_two_runs(capsys):
    with serve(saying("The answer is (A)."), models=[MODEL]) as one:
        with serve(saying("The answer is (B)."), models=[MODEL]) as other:
            assert evaluate(one) == 0
            assert evaluate(other) == 0
            assert len(one.requests) == len(other.requests) > 0
            assert evaluate(one) == 0  # goes on with its own answers
            assert len(one.requests) == len(other.requests)
            places = [server.url.split("/")[2] for server in (one, other)]
    names = [path.name for path in folders()]
    assert len(names) == 2
    for place in places:
        assert any(place.replace(":", "_") in name for name in names)
    values = [results(path) for path in folders()]
    assert {each["fingerprint"]["model"]["server"]["url"].split("/")[2] for each in values} == set(places)
    assert values[0]["fingerprint"]["model"]["server"]["root"] == "/models/a"


@pytest.mark.parametrize(
    "change",
    [
        {"root": "/models/b"},
        {"owned_by": "sglang"},
        {"created": 1_600_000_000},
        {"meta": {"size": 5, "n_params": 3}},
        {"parent": "base"},
    ],
)
def test_another_model_behind_one_address_is_another_run(change, capsys):
    with serve(saying("The answer is (A)."), models=[MODEL]) as server:
        assert evaluate(server) == 0
        assert evaluate(server, "output_dir=named") == 0
        server.models[0] = {**MODEL, **change}
        num_asked = len(server.requests)
        assert evaluate(server) == 0
        assert len(server.requests) > num_asked
        capsys.readouterr()
        assert evaluate(server, "output_dir=named") == 2
    error = capsys.readouterr().err
    assert f"model.server.{next(iter(change))}" in error
    assert "resume=false" in error
    assert len(folders()) == 2


def test_what_a_server_makes_anew_for_every_answer_decides_nothing(capsys):
    """vLLM says the time of the request as `created`, and gives every permission an id of its own."""
    import time

    with serve(saying("The answer is (A)."), models=[MODEL]) as server:
        for number in range(2):
            server.models[0] = {**MODEL, "created": int(time.time()) + number, "permission": [{"id": number}]}
            assert evaluate(server) == 0
        num_asked = len(server.requests)
    assert len(folders()) == 1
    assert num_asked == results(folders()[0])["num_samples"] * (2 if "zero_shot" in folders()[0].name else 1)


def test_a_server_that_moves_may_be_named(capsys):
    for _ in range(2):
        with serve(saying("The answer is (A)."), models=[MODEL]) as server:
            assert evaluate(server, "endpoint.server_name=node") == 0
            num_asked = len(server.requests)
    assert num_asked == 0
    assert "-m-node-" in folders()[0].name


def test_the_card_of_all_benchmarks_is_named_after_what_answered(capsys):
    with serve(saying("The answer is (A)."), models=[{**MODEL, "id": "org/served"}]) as one:
        assert evaluate(one, benchmark="all") == 0
    with serve(saying("The answer is (B)."), models=[{**MODEL, "id": "org/served"}]) as other:
        assert evaluate(other, benchmark="all") == 0
    shown = capsys.readouterr().out
    assert "Model card: org/served" in shown
    assert "glm-tiny" not in shown
    cards = [path for path in folders() if path.name.startswith("all-")]
    assert len(cards) == 2
    assert all("all-served-127.0.0.1_" in path.name for path in cards)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_any_length_make_folders(capsys):
    with serve(saying("The answer is (A)."), models=[{**MODEL, "id": "模型" * 300}]) as server:
        assert evaluate(server) == 0
    assert len(folders()) == 1


def test_failed_questions_end_with_a_code_of_their_own(capsys):
    reply = saying("The answer is (A).")
    fails = True

    def sometimes(path, body):
        nonlocal fails
        if fails:
            fails = False
            return 400, {"error": {"message": "context length exceeded"}}
        return reply(path, body)

    with serve(sometimes, models=[MODEL]) as server:
        assert evaluate(server, "endpoint.concurrency=1") == FAILED_QUESTIONS
        shown = capsys.readouterr().out
        assert "PARTIAL MMLU" in shown
        assert "context length exceeded" in shown
        assert results(folders()[0])["num_failed"] == 1
        num_asked = len(server.requests)
        assert evaluate(server, "endpoint.concurrency=1") == 0
        assert 0 < len(server.requests) - num_asked <= 2
    assert len(folders()) == 1
    assert results(folders()[0])["num_failed"] == 0


def test_no_key_is_in_any_file(monkeypatch, capsys):
    secret = "very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    reply = saying("The answer is (A).")

    def echo(path, body):
        if len(server.requests) == 2:
            return 400, {"error": {"message": f"refused {server.headers[-1]}"}}
        return reply(path, body)

    with serve(echo, models=[MODEL]) as server:
        place = server.url.removeprefix("http://")
        evaluate(server, f"endpoint.base_url='http://user:{secret}@{place}?key={secret}'")
        monkeypatch.delenv("OPENAI_API_KEY")
        assert secret in str(server.headers) or server.headers[-1]["Authorization"].startswith("Basic")
        assert any(secret in path for path, _ in server.requests)
    captured = capsys.readouterr()
    basic = server.headers[-1]["Authorization"].split()[1]
    texts = [captured.out, captured.err]
    texts += [
        path.read_text(encoding="utf-8", errors="replace") for path in Path().rglob("*") if path.is_file()
    ]
    assert len(texts) > 6
    for text in texts:
        assert secret not in text
        assert basic not in text
