"""Servers that are broken, greedy for keys, or hostile: nothing is lost, nothing let out, everything bounded."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from email.utils import formatdate
from pathlib import Path

import pytest

from evaluation.backend import Limits
from evaluation.backends.endpoint import EndpointSettings
from evaluation.backends.http_replies import MAX_REPLY_BYTES, seconds_asked
from evaluation.backends.openai_api import OpenAIBackend
from evaluation.sample import Failure, Prompt
from glmtune.errors import ConfigError, GlmtuneError
from glmtune.http_client.server_address import environment_proxy, read_address, shown
from tests.hostile.server_sockets import Request, completion, raw_server

REPO = Path(__file__).resolve().parents[2]
KEY = "sk-very-secret-0123456789"
QUICK = {"first_wait_seconds": 0.01, "max_retries": 3, "concurrency": 4, "timeout_seconds": 5.0}


def backend(url: str, **settings) -> OpenAIBackend:
    return OpenAIBackend(EndpointSettings(base_url=url, **{**QUICK, **settings}))


def ask(url: str, count: int = 6, **settings) -> dict:
    prompts = [Prompt(text=f"question {place}") for place in range(count)]
    return dict(backend(url, **settings).generate(prompts, Limits(8)))


def good(request: Request) -> None:
    request.reply(completion(f"answer to {request.json['prompt']}"))


def bad_at_3(bad):
    """Answer with ``bad`` to question 3, and well to all others."""

    def act(request: Request) -> None:
        (bad if request.json["prompt"] == "question 3" else good)(request)

    return act


class TestOneBadReplyCostsOneQuestion:
    @pytest.mark.parametrize(
        ("bad", "words", "num_attempts"),
        [
            (lambda r: r.reply({"error": {"message": "too long"}}, 400), "HTTP 400: too long", 1),
            (lambda r: r.reply({"detail": "too large"}, 413), "HTTP 413: too large", 1),
            (lambda r: r.reply({"error": "filtered"}, 403), "HTTP 403: filtered", 1),
            (lambda r: r.reply({"error": {"message": "no"}}), "HTTP 400: no", 1),
            (lambda r: r.reply({"object": "error", "message": "no", "code": 422}), "HTTP 422: no", 1),
            (
                lambda r: r.reply({"error": {"message": "later", "code": 503}}),
                "4 attempts.*HTTP 503: later",
                4,
            ),
            (lambda r: r.reply(completion(None)), "withheld an answer", 1),
            (lambda r: r.reply(completion("", "content_filter")), "withheld an answer", 1),
            (lambda r: r.reply({"choices": []}), "`choices` is empty", 3),
            (lambda r: r.reply({"choices": [{"text": 5}]}), "choices.0.text", 3),
            (lambda r: r.reply({"hello": 1}), "no `choices`, but: hello", 3),
            (lambda r: r.reply([]), "another form.*but: list", 3),
            (lambda r: r.reply(b"[" * 800 + b"]" * 800), "another form", 3),
            (
                lambda r: r.reply(b'{"error": ' + b"[" * 800 + b"]" * 800 + b"}", 400),
                "HTTP 400: Said|no reason",
                1,
            ),
            (lambda r: r.reply(b"<html>Bad gateway</html>"), "no JSON.*<html>Bad gateway", 3),
            (lambda r: r.reply(b'{"choices": [{"te'), "no JSON", 3),
            (lambda r: r.reply(b"\xff\xfe\x00"), "no UTF-8", 3),
            (lambda r: r.reply({}, 500), "HTTP 500", 4),
            (lambda r: r.reply({}, 502), "HTTP 502", 4),
            (lambda r: r.reply({}, 429, Retry_After="0.01"), "HTTP 429", 4),
            (lambda r: r.connection.close(), "the connection broke", 4),
            (lambda r: r.send(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"), "the connection broke", 4),
            (lambda r: r.send(b"nonsense\r\n\r\n"), "the connection broke", 4),
            (lambda r: time.sleep(30), "within 0.3 seconds.*timeout_seconds", 3),
        ],
    )
    def test_it_has_failed_and_the_others_are_answered(self, bad, words, num_attempts):
        with raw_server(bad_at_3(bad)) as server:
            answers = ask(server.url, timeout_seconds=0.3 if "0.3" in words else 5.0)
            asked = [r for r in server.requests if r.method == "POST" and r.json["prompt"] == "question 3"]
        failed = answers.pop(3)
        assert isinstance(failed, Failure)
        assert re.search(words, failed.reason), failed.reason
        assert {place: each.text for place, each in answers.items()} == {
            place: f"answer to question {place}" for place in (0, 1, 2, 4, 5)
        }
        assert len(asked) == num_attempts

    def test_an_answer_cut_in_its_reasoning_is_empty_and_truncated(self):
        with raw_server(lambda request: request.reply(completion(None, "length"))) as server:
            answer = ask(server.url, 1)[0]
        assert (answer.text, answer.stop_reason) == ("", "length")

    def test_no_letter_among_the_likeliest_costs_that_question(self):
        def act(request: Request) -> None:
            listed = {"x": -0.1} if request.json["prompt"] == "question 3" else {" A": -0.5, " B": -1.5}
            answer = completion(" A")
            answer["choices"][0]["logprobs"] = {"top_logprobs": [listed]}
            request.reply(answer)

        prompts = [Prompt(text=f"question {place}") for place in range(6)]
        with raw_server(act) as server:
            scores = dict(backend(server.url).score_choices(prompts, (" A", " B")))
        assert "None of the choices" in scores.pop(3).reason
        assert [each.best for each in scores.values()] == [0] * 5

    def test_odd_counts_of_tokens_cost_nothing(self):
        for usage in (None, [], {"prompt_tokens": -1}, {"prompt_tokens": None}, {"prompt_tokens": 1e300}):
            with raw_server(lambda r, usage=usage: r.reply({**completion("yes"), "usage": usage})) as server:
                assert ask(server.url, 1)[0].num_prompt_tokens == 0

    def test_more_failures_than_allowed_end_the_run_with_what_is_there(self):
        def act(request: Request) -> None:
            if request.json["prompt"] in ("question 0", "question 1", "question 2"):
                request.reply({"error": "no"}, 400)
            else:
                time.sleep(0.3)
                good(request)

        kept = []
        prompts = [Prompt(text=f"question {place}") for place in range(30)]
        with raw_server(act) as server:
            asked = backend(server.url, max_failed_questions=2, concurrency=8).generate(prompts, Limits(8))
            with pytest.raises(
                GlmtuneError, match=r"3 questions failed, but `endpoint.max_failed_questions` allows 2"
            ):
                kept.extend(asked)
            num_requests = len(server.requests)
            time.sleep(0.4)
            assert len(server.requests) == num_requests  # nothing is sent after the end
        answered = [place for place, each in kept if not isinstance(each, Failure)]
        assert len([each for _, each in kept if isinstance(each, Failure)]) == 3
        assert len(answered) >= 5  # those under way were waited for


class TestWhatMeetsEveryQuestionEndsAtOnce:
    @pytest.mark.parametrize(
        ("models", "words"),
        [
            (lambda r: r.reply({"error": "bad key"}, 401), r"HTTP 401: bad key\. Set the key"),
            (lambda r: r.reply({"error": "none"}, 404), r"HTTP 404: none\. Check `endpoint.base_url`"),
            (lambda r: r.reply({"data": 5}), r"gives no list of models"),
            (lambda r: r.reply({"data": [{"id": None}]}), r"lists no model \(`id`"),
            (lambda r: r.reply(b"<html>"), r"no JSON.*Check `endpoint.base_url`"),
        ],
    )
    def test_at_the_start(self, models, words):
        with raw_server(good, models=models) as server:
            with pytest.raises(GlmtuneError, match=words):
                backend(server.url)

    def test_a_server_that_dies_ends_the_run_with_what_is_there(self):
        kept = []
        with raw_server(good) as server:
            asked = backend(server.url, concurrency=1).generate(
                [Prompt(text=f"question {place}") for place in range(6)], Limits(8)
            )
            kept.append(next(asked))
        with pytest.raises(GlmtuneError, match=r"in 4 attempts.*cannot be reached \(Connection refused\)"):
            kept.extend(asked)
        assert len(kept) >= 1

    def test_a_refused_key_in_the_middle(self):
        with raw_server(bad_at_3(lambda r: r.reply({"error": "expired"}, 401))) as server:
            kept = []
            with pytest.raises(GlmtuneError, match="HTTP 401: expired"):
                kept.extend(
                    backend(server.url).generate([Prompt(text=f"question {i}") for i in range(30)], Limits(8))
                )
            assert len(server.requests) < 20
        assert kept


@pytest.mark.parametrize(
    ("retry_after", "date", "seconds"),
    [
        ("7", None, 7.0),
        ("0.5", None, 0.5),
        ("-3", None, 0.0),
        ("1e400", None, 60.0),
        ("9" * 5000, None, 60.0),
        ("soon", None, 0.0),
        (None, None, 0.0),
        (formatdate(1_000_000_020, usegmt=True), formatdate(1_000_000_000, usegmt=True), 20.0),
        (formatdate(1_000_000_000, usegmt=True), formatdate(1_000_000_020, usegmt=True), 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", "nonsense", 60.0),
    ],
)
def test_the_wait_a_server_asks_for(retry_after, date, seconds):
    assert seconds_asked(retry_after, date) == pytest.approx(seconds)


class TestKeys:
    @pytest.fixture(autouse=True)
    def _key(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    @pytest.mark.parametrize("at_the_start", [True, False])
    def test_a_redirect_elsewhere_is_refused_and_the_key_goes_nowhere(self, status, at_the_start):
        with raw_server(good) as thief:
            target = f"http://127.0.0.1:{thief.port}/v1/steal?x=1"
            move = lambda r: r.reply(b"", status, Location=target)  # noqa: E731
            with raw_server(move, **({"models": move} if at_the_start else {})) as server:
                with pytest.raises(GlmtuneError) as caught:
                    ask(server.url)
            assert thief.requests == []
        assert f"redirects to http://127.0.0.1:{thief.port}, another host" in str(caught.value)
        assert f"than http://127.0.0.1:{server.port}" in str(caught.value)
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize(
        "target",
        [
            "http://localhost:{port}/v1/models",
            "https://127.0.0.1:{port}/v1/models",
            "//evil.example/v1",
            "http://user:pw@127.0.0.1:{port}/v1/models",
            "ftp://127.0.0.1/",
            "file:///etc/passwd",
            "http://[bad",
            "\x1b]0;owned\x07http://evil.example",
        ],
    )
    def test_what_counts_as_elsewhere(self, target):
        def models(request: Request) -> None:
            request.reply(b"", 302, Location=target.format(port=request.connection.getsockname()[1]))

        with raw_server(good, models=models) as server:
            with pytest.raises(GlmtuneError) as caught:
                backend(server.url)
        assert str(caught.value).isprintable()
        assert "redirects to" in str(caught.value) or "the connection broke" in str(caught.value)

    def test_a_redirect_on_the_same_server_is_followed_with_the_question(self):
        def act(request: Request) -> None:
            if request.path == "/v1/completions":
                request.reply(b"", 307, Location="/v2/completions")
            else:
                good(request)

        with raw_server(act) as server:
            assert ask(server.url, 1)[0].text == "answer to question 0"
            assert server.requests[-1].headers["authorization"] == f"Bearer {KEY}"

    def test_redirects_without_end_are_counted(self):
        with raw_server(good, models=lambda r: r.reply(b"", 302, Location=r.path + "x")) as server:
            with pytest.raises(GlmtuneError, match="redirects more than 5 times"):
                backend(server.url)
            assert len(server.requests) == 6

    @pytest.mark.parametrize("where", ["user:{}@127.0.0.1:{}/v1", "127.0.0.1:{1}/v1?key={0}&v=2", "key"])
    def test_no_key_is_shown_or_kept(self, where, caplog, monkeypatch):
        """Whatever the server repeats, and at every level of logging."""
        caplog.set_level(logging.DEBUG)

        def echo(request: Request) -> None:
            seen = f"{request.path} {request.headers.get('authorization')} {KEY}"
            status = {"question 1": 400, "question 2": 500, "question 4": 200}.get(request.json["prompt"])
            if status is None:
                good(request)
            else:
                request.reply({seen: 1} if status == 200 else {"error": {"message": seen}}, status)

        with raw_server(echo) as server:
            url = f"http://{where.format(KEY, server.port)}" if where != "key" else server.url
            if where != "key":
                monkeypatch.delenv("OPENAI_API_KEY")
            asked = backend(url)
            answers = dict(asked.generate([Prompt(text=f"question {i}") for i in range(6)], Limits(8)))
            sent = " ".join(f"{r.path} {r.headers.get('authorization')}" for r in server.requests)
        assert answers[0].text == "answer to question 0"
        failed = [each.reason for each in answers.values() if isinstance(each, Failure)]
        assert len(failed) == 3
        basic = read_address(url).headers.get("Authorization", "Basic -").split()[1]
        assert KEY in sent or (basic != "-" and basic in sent)
        for text in (*failed, caplog.text, repr(asked.identity), repr(read_address(url))):
            assert KEY not in text
            assert basic == "-" or basic not in text

    def test_a_list_of_models_that_repeats_the_key_names_no_run_after_it(self):
        model = {
            "id": f"m {KEY}",
            "max_model_len": 5,
            "root": KEY,
            "meta": {KEY: KEY, "size": 5, "deep": {}, "no": None},
        }
        with raw_server(good, models={"data": [model]}) as server:
            assert KEY not in repr(backend(server.url).identity)
            assert backend(server.url).identity.server["meta"]["size"] == 5
            with pytest.raises(ConfigError, match=r"serves m \*\*\*") as caught:
                backend(server.url, model="other")
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize("key", ["sk-x\nX-Injected: 1", "sk ey", "schlüssel", "sk\x00"])
    def test_a_key_that_is_none_is_refused_without_being_shown(self, key, monkeypatch):
        if "\x00" not in key:
            monkeypatch.setenv("OPENAI_API_KEY", key)
            with pytest.raises(ConfigError, match=r"variable `OPENAI_API_KEY`") as caught:
                backend("http://127.0.0.1:1/v1")
            assert key not in str(caught.value)

    @pytest.mark.parametrize(
        "url",
        [
            "http://user:pa#ss-word@host/v1",
            "http://user:pa/ss-word@host/v1",
            "http://user:pa?ss-word@host/v1",
            "user:pass-word@host",
            "ftp://user:pass-word@host/v1",
            "http://user:pass-word@host:port/v1",
            "http://:80/v1?key=pass-word",
        ],
    )
    def test_an_address_that_is_none_is_refused_without_its_password(self, url):
        with pytest.raises(ConfigError, match=r"`endpoint.base_url` must start with http") as caught:
            EndpointSettings(base_url=url)
        assert "ss-word" not in str(caught.value)

    def test_a_proxy_of_the_environment_reads_no_key(self, monkeypatch):
        with raw_server(good) as proxy:
            monkeypatch.setenv("http_proxy", f"http://me:proxy-password@127.0.0.1:{proxy.port}")
            with raw_server(good) as server:  # this machine is asked directly
                assert ask(server.url, 1)[0].text == "answer to question 0"
            with pytest.raises(ConfigError, match=r"the proxy `http://127.0.0.1:\d+`.*NO_PROXY") as caught:
                backend("http://model.example/v1")
            assert proxy.requests == []
        assert "proxy-password" not in str(caught.value)
        monkeypatch.setenv("no_proxy", "model.example")
        assert (
            environment_proxy(read_address("http://model.example/v1", api_key_env="OPENAI_API_KEY")) is None
        )
        monkeypatch.delenv("no_proxy")
        # There is no key to read.
        assert environment_proxy(read_address("http://model.example/v1")) is not None
        monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
        with pytest.raises(ConfigError, match="only http:// ones"):
            environment_proxy(read_address("https://model.example/v1"))


class TestAnswersAreBounded:
    def test_a_body_without_end_is_refused_with_the_limit_named(self):
        def endless(request: Request) -> None:
            request.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
            while True:
                request.send(b"1," * 32768)

        with raw_server(bad_at_3(endless)) as server:
            answers = ask(server.url)
        assert f"longer than {MAX_REPLY_BYTES:,} bytes" in answers[3].reason
        assert answers[5].text == "answer to question 5"

    def test_a_packed_bomb_is_not_unpacked(self):
        bomb = gzip.compress(gzip.compress(bytes(300 * 2**20), 9), 9)
        with raw_server(bad_at_3(lambda r: r.reply(bomb, Content_Encoding="gzip, gzip"))) as server:
            tracemalloc.start()
            try:
                answers = ask(server.url)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert f"longer than {MAX_REPLY_BYTES:,} bytes" in answers[3].reason
        assert peak < 8 * MAX_REPLY_BYTES

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested deeper than"),
            (b'{"usage": ' + b"9" * 5_000 + b"}", "a number of 5,000 digits, but 20 are the limit"),
            (b'{"choices": [{"text": "' + b"x" * MAX_REPLY_BYTES + b'"}]}', "longer than"),
        ],
    )
    def test_what_is_too_deep_or_too_long(self, body, words):
        with raw_server(bad_at_3(lambda r: r.reply(body))) as server:
            began = time.monotonic()
            answers = ask(server.url)
        assert words in answers[3].reason
        assert answers[5].text == "answer to question 5"
        assert time.monotonic() - began < 20

    def test_a_trickle_ends_with_the_timeout(self):
        def trickle(request: Request) -> None:
            request.send(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                request.send(b" ")
                time.sleep(0.02)

        with raw_server(bad_at_3(trickle)) as server:
            answers = ask(server.url, timeout_seconds=0.3)
        assert "no whole answer came within 0.3 seconds" in answers[3].reason

    def test_nothing_of_a_server_reaches_the_terminal_raw(self):
        said = "\x1b]52;c;cm0gLXJm\x07\x1b[2Jred\x9b31m\u202e\n[bold]x[/bold]"
        with raw_server(bad_at_3(lambda r: r.reply({"error": {"message": said}}, 400))) as server:
            reason = ask(server.url)[3].reason
        assert reason.isprintable()
        assert "red" in reason

        with raw_server(good, models={"data": [{"id": said, "max_model_len": 5}]}) as server:
            with pytest.raises(ConfigError) as caught:
                backend(server.url, model="other")
        assert str(caught.value).isprintable()

    def test_foreign_text_is_short(self):
        assert len(shown("x" * 10**6)) < 400
        assert shown("a\r\nb\tc") == "a b c"


# What is started in the background of a shell inherits that Ctrl-C is ignored, and Python leaves it at that.
RUN = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from evaluation.backends.endpoint import EndpointSettings
from evaluation.backends.openai_api import OpenAIBackend
from evaluation.running.runner import run_task
from tests.evaluation.doubles import make_task

backend = OpenAIBackend(EndpointSettings(base_url=sys.argv[1], concurrency=64))
run_task(make_task(sizes={"law": 100}), backend, Path("out"))
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
def test_ctrl_c_ends_at_once_while_64_requests_hang(tmp_path):
    seen = []

    def hang(request: Request) -> None:
        seen.append(request)
        if len(seen) == 1:
            good(request)
        else:
            time.sleep(60)

    with raw_server(hang) as server:
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        run = subprocess.Popen(
            [sys.executable, "-c", RUN, server.url], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
        )
        try:
            deadline = time.monotonic() + 100
            while len(seen) < 65 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(seen) == 65
            run.send_signal(signal.SIGINT)
            _, error = run.communicate(timeout=30)  # half of the time for which the server hangs
        finally:
            run.kill()
        time.sleep(0.3)
        assert len(seen) == 65
    assert b"KeyboardInterrupt" in error
    [kept] = (tmp_path / "out" / "journal-rank0.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(kept)["completion"].startswith("answer to Q:")
