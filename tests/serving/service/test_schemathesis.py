"""Requests made from the server's own description: whatever they hold, no 5xx."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from tests.serving.service.served import serve

schemathesis = pytest.importorskip("schemathesis")
WORDS = ("answers.max_tokens=8", "access.admin=true")
ADMIN_KEY = "admin-key-0123456789"


def bounded(body: Any, *, is_original: bool) -> None:
    """Ask for little: what is long or manifold takes time and shows nothing new."""
    if isinstance(body, dict):
        for name, most in {"n": 2, "max_tokens": 8, "max_completion_tokens": 8, "max_length": 60}.items():
            if isinstance(body.get(name), int | float) and body[name] > most and body[name] < 10**5:
                body[name] = most
        if is_original and "prompt" in body and not body.get("max_length"):
            body["max_length"] = 60  # else up to 2048


def assert_no_5xx(base: Path, adapter_dir: Path, num_examples: int) -> None:
    """Send requests that fit the description, and such that do not, to every route."""
    num_sent: dict[str, int] = {}
    environment = {"GLMTUNE_ADMIN_KEYS": ADMIN_KEY}
    # A model of 256 tokens of context and two narrow layers: what is asked for at length ends soon.
    words = [f"model.source={base}", f"access.adapter_dir={adapter_dir}", *WORDS]
    with serve(*words, environment=environment) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

                @settings(
                    max_examples=num_examples,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    phases=[Phase.generate],  # the first failure says enough; making it smaller takes minutes
                    suppress_health_check=list(HealthCheck),
                )
                @given(operation.as_strategy(generation_mode=mode))
                def send(case: Any) -> None:
                    num_sent[case.path] = num_sent.get(case.path, 0) + 1
                    bounded(case.body, is_original=case.path == "/")
                    key = {"Authorization": f"Bearer {ADMIN_KEY}"}
                    reply = case.call(base_url=served.url, headers=key, timeout=60)
                    assert reply.status_code < 500, (case.as_curl_command(), reply.text)

                # A route without parameters has nothing that could be wrong.
                with contextlib.suppress(Unsatisfiable):
                    send()
        assert served.ask("/health").json == {"status": "ready"}
    assert {"/v1/chat/completions", "/v1/completions", "/", "/v1/models", "/admin/adapters"} <= set(num_sent)
    assert sum(num_sent.values()) > 8 * num_examples


def test_no_5xx(tiny_base: Path, tmp_path: Path) -> None:
    assert_no_5xx(tiny_base, tmp_path, 12)


@pytest.mark.slow
def test_no_5xx_with_many_requests(tiny_base: Path, tmp_path: Path) -> None:
    assert_no_5xx(tiny_base, tmp_path, 400)
