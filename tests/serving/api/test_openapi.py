"""The OpenAPI description: it names the fields, and no request made of it fails the server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.api.conftest import Scripts


def test_bodies_are_described(scripts: Scripts) -> None:
    schema = scripts.start("好").get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/",
    }
    chat = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert {"messages", "temperature", "tools", "prefix_strength", "adapter_scale", "stop"} <= set(
        chat["properties"]
    )
    assert chat["required"] == ["messages"]
    assert "$ref" not in str(chat)


@pytest.mark.slow
def test_no_request_made_of_it_fails_the_server(scripts: Scripts) -> None:
    schemathesis: Any = pytest.importorskip("schemathesis")
    hypothesis: Any = pytest.importorskip("hypothesis")
    server = scripts.start("早点休息" * 3)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: set[int] = set()
    for operation in schema.get_all_operations():
        modes = schemathesis.GenerationMode
        is_get = operation.ok().method.upper() == "GET"  # nothing of these can be wrong
        for mode in (modes.POSITIVE,) if is_get else (modes.POSITIVE, modes.NEGATIVE):

            @hypothesis.settings(
                max_examples=40, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.given(case=operation.ok().as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                reply = case.call(base_url=server.url)
                statuses.add(reply.status_code)
                assert reply.status_code < 500, (reply.status_code, reply.text, case.body)

            check()
    assert 200 in statuses
    assert 400 in statuses
