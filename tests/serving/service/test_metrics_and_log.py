"""Case 56: the names of the metrics, which dashboards hold on to; and the lines of the log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.service.served import CHAT, LONG, SHORT, Served, serve

REPO = Path(__file__).resolve().parents[3]
NAMES = {
    "glmtune_adapters": "gauge",
    "glmtune_build_info": "gauge",
    "glmtune_cache_budget_tokens": "gauge",
    "glmtune_cache_kept_tokens": "gauge",
    "glmtune_cache_tokens": "gauge",
    "glmtune_generated_tokens_total": "counter",
    "glmtune_draft_tokens_total": "counter",
    "glmtune_accepted_draft_tokens_total": "counter",
    "glmtune_http_request_seconds": "histogram",
    "glmtune_http_requests_total": "counter",
    "glmtune_prompt_cached_tokens_total": "counter",
    "glmtune_prompt_tokens_total": "counter",
    "glmtune_ready": "gauge",
    "glmtune_requests_running": "gauge",
    "glmtune_requests_waiting": "gauge",
    "glmtune_switch_total": "counter",
    "glmtune_time_per_output_token_seconds": "histogram",
    "glmtune_time_to_first_token_seconds": "histogram",
}
"""Whoever changes one breaks what others have built: add, and keep."""


def test_case_56_names(served: Served) -> None:
    assert served.ask(CHAT, SHORT).status == 200
    reply = served.ask("/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(reply.body.decode()))
    found = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in families
        if family.name.startswith("glmtune")
    }
    assert found == NAMES
    names = {sample.name for family in families for sample in family.samples}
    assert not [name for name in names if ":" in name or "millisecond" in name or name.endswith("_created")]


def test_case_56_names_are_documented() -> None:
    page = (REPO / "docs" / "serving.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}" not in page] == []


def test_case_56_counts(served: Served) -> None:
    counted = 'glmtune_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}'
    assert served.ask(CHAT, SHORT).status == 200
    before = {name: served.metric(name) for name in (counted, "glmtune_generated_tokens_total")}
    first = served.metric("glmtune_time_to_first_token_seconds_count")
    usage = served.ask(CHAT, LONG | {"max_tokens": 6}).json["usage"]
    assert served.metric(counted) == before[counted] + 1
    generated = served.metric("glmtune_generated_tokens_total") - before["glmtune_generated_tokens_total"]
    assert generated == usage["completion_tokens"] == 6
    assert served.metric("glmtune_time_to_first_token_seconds_count") == first + 1
    assert served.metric("glmtune_requests_running") == 0
    assert served.metric("glmtune_ready") == 1


def test_case_56_labels_are_bounded(served: Served) -> None:
    for number in range(20):
        served.ask(f"/nowhere/{number}")
        served.ask("/v1/models", method=f"M{number}")
    text = served.ask("/metrics").body.decode()
    assert "nowhere" not in text
    assert 'method="M' not in text


def test_a_line_a_request(served: Served) -> None:
    reply = served.ask(CHAT, SHORT, X_Request_ID="mine-1")
    assert reply.headers["X-Request-ID"] == "mine-1"
    line = served.await_line("id mine-1")
    pattern = r"[\d-]+ [\d:]+ POST /v1/chat/completions 200 \d+\+4 tokens, first after [\d.]+ s, [\d.]+ s, id mine-1\n"
    assert re.fullmatch(pattern, line)
    assert "你好" not in served.said().partition("next: ")[2].partition("\n")[2]


@pytest.mark.parametrize("given", ["a b", "a\tb", "x" * 200, "é", ""])
def test_ids_that_may_not_stand_in_a_log_are_replaced(served: Served, given: str) -> None:
    reply = served.ask("/v1/models", X_Request_ID=given)
    assert re.fullmatch(r"[0-9a-f]{32}", reply.headers["X-Request-ID"])


def test_paths_write_no_lines_of_their_own(served: Served) -> None:
    served.ask("/v1/%0A2026-01-01%20forged%1b[31m?key=secret-word", X_Request_ID="forger")
    line = served.await_line("id forger")
    assert "/v1/%0A2026-01-01%20forged%1b[31m 404" in line
    assert "secret-word" not in served.said()


def test_contents_are_logged_where_asked_for() -> None:
    with serve("answers.log_contents=true") as served:
        body = {"messages": [{"role": "user", "content": "first\nsecond \x1b[31m"}], "max_tokens": 2}
        served.ask(CHAT, body, X_Request_ID="noted")
        asked = served.await_line("noted asked: ")
        assert "first\\nsecond" in asked
        assert "\x1b" not in served.said()
        assert '"role"' in served.await_line("noted answered: ")


def test_headers_say_little(served: Served) -> None:
    reply = served.ask("/health")
    assert "Server" not in reply.headers
    assert reply.headers["Cache-Control"] == "no-store"
    assert served.ask("/docs").status == 404
    assert served.ask("/redoc").status == 404
    assert "/v1/chat/completions" in served.ask("/openapi.json").json["paths"]
