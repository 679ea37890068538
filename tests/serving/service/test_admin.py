"""Adapters that come and go while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glmtune.errors import ConfigError
from glmtune.loading import load_base
from glmtune.prefix.checkpoint import save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from glmtune.serving.api.errors import ApiError
from glmtune.serving.keys import read_keys
from glmtune.serving.service.admin import within
from recipes.serve import COMMAND, run
from recipes.words.compose import load_settings
from tests.serving.service.served import CHAT, SHORT, Served, serve

KEY, ADMIN_KEY = "user-key-of-the-api", "admin-key-0123456789"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
USER = {"Authorization": f"Bearer {KEY}"}
PLACES = "/admin/adapters"


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two prefixes for the embedded model, and what must not be read beside it."""
    root = tmp_path_factory.mktemp("served")
    folder = root / "adapters"
    model = load_base("glm-tiny", device="cpu")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
        with torch.no_grad():
            encoder.embedding.weight.mul_(3)  # as it is made at random it changes no token of the answer
        save_prefix(encoder, folder / name)
    save_prefix(PrefixEncoder(prefix_shape(model.config), pre_seq_len=4), root / "secret")
    (folder / "link").symlink_to(root / "secret")
    return folder


@pytest.fixture(scope="module")
def open_to_admins(adapter_dir: Path) -> Iterator[Served]:
    words = ["access.admin=true", f"access.adapter_dir={adapter_dir}"]
    keys = {"GLMTUNE_API_KEYS": KEY, "GLMTUNE_ADMIN_KEYS": ADMIN_KEY}
    with serve(*words, environment=keys) as server:
        yield server


def models(served: Served) -> list[str]:
    return [model["id"] for model in served.ask("/v1/models", **USER).json["data"]]


def test_off_by_default(served: Served) -> None:
    assert served.ask(PLACES, {"name": "x", "path": "y"}).status == 404
    assert served.ask(f"{PLACES}/x", method="DELETE").status == 404


def test_needs_a_key_of_its_own(open_to_admins: Served) -> None:
    for given in ({}, USER, {"Authorization": "Bearer x"}):
        for method, path, body in (("POST", PLACES, {"name": "x", "path": "one"}), ("GET", PLACES, None)):
            assert open_to_admins.ask(path, body, method=method, **given).status == 401
        assert open_to_admins.ask(f"{PLACES}/x", method="DELETE", **given).status == 401
    assert open_to_admins.ask("/v1/models", **ADMIN).status == 401
    assert models(open_to_admins) == ["glm-tiny"]


def test_an_adapter_comes_and_goes(open_to_admins: Served) -> None:
    served = open_to_admins
    base = served.ask(CHAT, SHORT, **USER).json["choices"][0]["message"]["content"]
    added = served.ask(PLACES, {"name": "style", "path": "one"}, **ADMIN)
    assert added.status == 201
    assert added.json["id"] == "style"
    assert added.json["path"] == "one"
    assert added.json["num_tokens"] == 4
    assert models(served) == ["glm-tiny", "style"]
    assert [info["id"] for info in served.ask(PLACES, **ADMIN).json["data"]] == ["style"]
    tuned = served.ask(CHAT, SHORT | {"model": "style"}, **USER)
    assert tuned.json["model"] == "style"
    assert tuned.json["choices"][0]["message"]["content"] != base
    taken = served.ask(PLACES, {"name": "style", "path": "two"}, **ADMIN)
    assert (taken.status, taken.error["code"]) == (409, "name_taken")
    replaced = served.ask(PLACES, {"name": "style", "path": "two", "replace": True}, **ADMIN)
    assert (replaced.status, replaced.json["path"]) == (201, "two")
    other = served.ask(CHAT, SHORT | {"model": "style"}, **USER).json["choices"][0]["message"]["content"]
    assert other != tuned.json["choices"][0]["message"]["content"]
    gone = served.ask(f"{PLACES}/style", method="DELETE", **ADMIN)
    assert gone.json == {"object": "adapter", "id": "style", "deleted": True}
    assert models(served) == ["glm-tiny"]
    assert served.ask(CHAT, SHORT | {"model": "style"}, **USER).error["code"] == "model_not_found"
    assert served.ask(f"{PLACES}/style", method="DELETE", **ADMIN).status == 404


@pytest.mark.parametrize(
    "path", ["../secret", "one/../../secret", "/etc", "link", ".", "", "nothing", "a\0b", "~", "one/" * 2000]
)
def test_places_outside_the_folder(open_to_admins: Served, adapter_dir: Path, path: str) -> None:
    refused = open_to_admins.ask(PLACES, {"name": "x", "path": path}, **ADMIN)
    assert (refused.status, refused.error["param"]) == (400, "path")
    with pytest.raises(ApiError, match="adapter_dir"):
        within(adapter_dir.resolve(), path)
    assert models(open_to_admins) == ["glm-tiny"]


@pytest.mark.parametrize(
    "body",
    [
        {"name": "../x", "path": "one"},
        {"name": "a b", "path": "one"},
        {"name": "x" * 65, "path": "one"},
        {"name": "glm-tiny", "path": "one"},
        {"name": "x"},
        {"name": "x", "path": "one", "kind": "full"},
        {"name": "x", "path": "one", "other": 1},
        {"name": "x", "path": 5},
        [],
    ],
)
def test_what_cannot_be_added(open_to_admins: Served, body: object) -> None:
    refused = open_to_admins.ask(PLACES, body, **ADMIN)
    assert refused.status == 400
    assert refused.error["message"]
    assert models(open_to_admins) == ["glm-tiny"]


@pytest.mark.parametrize("key", [None, "short"])
def test_routes_without_a_good_key_do_not_open(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLMTUNE_ADMIN_KEYS", raising=False)
    if key is not None:
        monkeypatch.setenv("GLMTUNE_ADMIN_KEYS", key)
        assert read_keys("x", None, "GLMTUNE_ADMIN_KEYS") == [key]
    settings = load_settings(COMMAND, ["access.admin=true", f"access.adapter_dir={tmp_path}", "port=0"])
    with pytest.raises(ConfigError, match="at least 16 characters"):
        run(settings)
