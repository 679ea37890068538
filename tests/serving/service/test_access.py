"""Keys, CORS, foreign pages and foreign names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from glmtune.errors import ConfigError
from glmtune.serving.app import access_rules
from glmtune.serving.keys import read_keys
from glmtune.serving.service.guard import Guard, Keys
from glmtune.serving.settings import AccessSettings
from tests.serving.service.served import CHAT, SHORT, Served, serve

KEYS = ("first-key-1234", "second-key-5678")
PAGE = "https://chat.example.com"
PREFLIGHT = {
    "Origin": PAGE,
    "Access_Control_Request_Method": "POST",
    "Access_Control_Request_Headers": "authorization,content-type",
}


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """A server with keys, for pages of one other origin."""
    words = [f"access.cors_origins=[{PAGE}]", "access.allowed_hosts=[chat.example.com]"]
    with serve(*words, environment={"GLMTUNE_API_KEYS": ",".join(KEYS)}) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, SHORT),
        ("/v1/completions", {"prompt": "你好", "max_tokens": 2}),
        ("/v1/models", None),
        ("/", {"prompt": "你好"}),
        ("/metrics", None),
    ],
)
def test_case_54_key(locked: Served, path: str, body: object) -> None:
    for given in ({}, bearer("first-key-123"), bearer(""), {"Authorization": f"Basic {KEYS[0]}"}):
        refused = locked.ask(path, body, **given)
        assert refused.status == 401, given
        assert refused.error["code"] == "invalid_api_key"
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    for key in KEYS:
        assert locked.ask(path, body, **bearer(key)).status == 200


def test_case_54_health_and_page_are_open(locked: Served) -> None:
    assert locked.ask("/health").json == {"status": "ready"}
    page = locked.ask("/")
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")
    assert all(key.encode() not in page.body for key in KEYS)


def test_case_54_key_is_in_no_log(locked: Served) -> None:
    wrong = "wrong-key-that-nobody-may-read"
    locked.ask(CHAT, SHORT, X_Request_ID="asked-wrongly", **bearer(wrong))
    locked.ask(f"/v1/models?api_key={KEYS[0]}", X_Request_ID="asked-in-the-address", **bearer(KEYS[1]))
    assert "401" in locked.await_line("asked-wrongly")
    assert "200" in locked.await_line("asked-in-the-address")
    said = locked.said()
    assert not [key for key in (wrong, *KEYS) if key in said]


def test_case_54_compares_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda one, two: compared.append((one, two)) or one == two)
    keys = Keys(KEYS)
    assert KEYS[0] in keys
    assert "other" not in keys
    assert len(compared) == 2 * len(KEYS)  # every key each time, also after one that matched
    assert {len(side) for pair in compared for side in pair} == {32}
    assert not any(key in repr(vars(keys)) for key in KEYS)


def test_case_53_no_cors_header_by_default(served: Served) -> None:
    replies = [served.ask("/v1/models"), served.ask("/health"), served.ask("/v1/models", Origin=served.url)]
    assert [reply.status for reply in replies] == [200, 200, 200]
    names = [name.lower() for reply in replies for name in reply.headers]
    assert not [name for name in names if name.startswith("access-control")]
    assert served.ask(CHAT, method="OPTIONS", **PREFLIGHT).status == 403


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/"])
def test_case_53_preflight_needs_no_key(locked: Served, path: str) -> None:
    reply = locked.ask(path, method="OPTIONS", **PREFLIGHT)
    assert reply.status == 200
    assert reply.headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in reply.headers["Access-Control-Allow-Methods"]
    assert "authorization" in reply.headers["Access-Control-Allow-Headers"]


def test_case_53_refusals_carry_the_headers(locked: Served) -> None:
    refused = locked.ask(CHAT, SHORT, Origin=PAGE)
    assert refused.status == 401
    assert refused.headers["Access-Control-Allow-Origin"] == PAGE
    answered = locked.ask(CHAT, SHORT, Origin=PAGE, **bearer(KEYS[0]))
    assert answered.status == 200
    assert answered.headers["Access-Control-Allow-Origin"] == PAGE
    assert "X-Request-ID" in answered.headers["Access-Control-Expose-Headers"]


def test_case_53_other_origins_get_none(locked: Served) -> None:
    refused = locked.ask(CHAT, SHORT, Origin="https://evil.example", **bearer(KEYS[0]))
    assert refused.status == 403
    assert "Access-Control-Allow-Origin" not in refused.headers
    assert "access.cors_origins" in refused.error["message"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "file://", "http://127.0.0.1:1", "https://["]
)
def test_foreign_pages_are_refused_on_loopback(served: Served, origin: str) -> None:
    refused = served.ask(CHAT, SHORT, Origin=origin)
    assert (refused.status, refused.error["code"]) == (403, "forbidden")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "[::2]"])
def test_foreign_names_are_refused_on_loopback(served: Served, host: str) -> None:
    """DNS rebinding: a page of evil.example whose name now points to 127.0.0.1 is of the same origin."""
    refused = served.ask(CHAT, SHORT, Host=host, Origin=f"http://{host}")
    assert refused.status == 403
    assert "access.allowed_hosts" in refused.error["message"]


def test_own_names_are_answered(served: Served, locked: Served) -> None:
    for host in (f"127.0.0.1:{served.port}", "localhost:9", "LOCALHOST", "[::1]:80", "localhost."):
        assert served.ask("/v1/models", Host=host).status == 200, host
    own = served.ask("/v1/models", Host=f"localhost:{served.port}", Origin=f"http://localhost:{served.port}")
    assert own.status == 200
    # Behind a proxy on this machine, whose own name is allowed: its scheme may differ from ours.
    behind = {"Host": "chat.example.com", "Origin": "https://chat.example.com"}
    assert locked.ask("/v1/models", **behind, **bearer(KEYS[0])).status == 200


def test_elsewhere_names_are_unknown_and_any_is_answered() -> None:
    rules = access_rules(AccessSettings(), host="0.0.0.0", is_loopback=False, keys=["k"], admin_keys=[])
    assert rules.hosts is None
    assert not rules.checks_origin
    named = AccessSettings(allowed_hosts=["chat.example.com"])
    rules = access_rules(named, host="0.0.0.0", is_loopback=False, keys=["k"], admin_keys=[])
    assert rules.hosts == {"chat.example.com"}
    assert Guard(None, rules)._foreign(  # type: ignore[arg-type]
        {"path": "/", "headers": [(b"host", b"other.example")]}
    )


# ---- where keys come from


def test_keys_of_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nabc\n\n  def \n", encoding="utf-8")
    monkeypatch.setenv("SOME_KEYS", "ghi, jkl")
    assert read_keys("access.api_keys_file", str(file), "SOME_KEYS") == ["abc", "def", "ghi", "jkl"]
    monkeypatch.delenv("SOME_KEYS")
    assert read_keys("access.api_keys_file", None, "SOME_KEYS") == []


@pytest.mark.parametrize("content", ["", "# none\n\n", "se cret\n", "geheim-ä\n", "a,b\n"])
def test_a_file_without_good_keys_lets_nobody_in_freely(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="api_keys_file") as caught:
        read_keys("access.api_keys_file", str(file), "NO_SUCH_VARIABLE")
    assert not [word for word in ("se cret", "geheim", "a,b") if word in str(caught.value)]


def test_an_empty_variable_and_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", " ,")
    with pytest.raises(ConfigError, match="`SOME_KEYS` of the environment is set, but it holds no key"):
        read_keys("access.api_keys_file", None, "SOME_KEYS")
    with pytest.raises(ConfigError, match="/no/such/file"):
        read_keys("access.api_keys_file", "/no/such/file", "NO_SUCH_VARIABLE")
