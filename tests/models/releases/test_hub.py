"""The real huggingface_hub client against a stand-in of the hub: what is fetched, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glmtune.errors import CheckpointError, ConfigError, MissingExtraError
from glmtune.models.load import load_official
from glmtune.models.releases.families import Family
from glmtune.models.releases.source import family_of_source, resolve_source
from tests.models.releases.hub_server import Hub, serving

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"
POISON = b"raise SystemExit('code of a checkpoint was run')\n"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with a tiny release: code that must not run, and both weight formats."""
    files = {
        file.name: file.read_bytes()
        for file in (GOLDEN / "chatglm2").iterdir()
        if "expected" not in file.name
    }
    files |= {
        "modeling_chatglm.py": POISON,
        "tokenization_chatglm.py": POISON,
        "pytorch_model.bin": b"pickle",
    }
    files |= {"tokenizer.model": b"pieces", "README.md": b"words"}
    with serving(Hub({"zai-org/chatglm2-6b": files})) as served:
        yield served


def resolve(source: str, hub: Hub, cache: Path, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """Resolve in a process of its own, because the client reads its environment when it is imported."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = (
        "import sys\nfrom glmtune.errors import GlmtuneError\nfrom glmtune.models.releases.source import resolve_source\n"
        "try:\n    print(resolve_source(sys.argv[1]))\n"
        "except GlmtuneError as error:\n    sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    command = [sys.executable, "-c", code, source]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_both_owners_are_one_model_without_code(hub: Hub, tmp_path: Path) -> None:
    folders = {
        source: resolve(source, hub, tmp_path).stdout.strip()
        for source in ("THUDM/chatglm2-6b", "zai-org/chatglm2-6b", "chatglm2-6b")
    }
    assert len(set(folders.values())) == 1, folders
    folder = Path(folders["chatglm2-6b"])
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    }
    assert len(hub.files_sent) == len(names)  # each once, and no .py nor the second weight format
    assert not [name for _, name in hub.files_sent if name.endswith((".py", ".bin"))]
    model = load_official(folder, dtype=torch.float32)
    assert model.family == Family.CHATGLM2
    offline = resolve("THUDM/chatglm2-6b", hub, tmp_path, offline=True)
    assert offline.stdout.strip() == str(folder)


def test_a_mirror_that_knows_only_the_older_name(hub: Hub, tmp_path: Path) -> None:
    hub.repositories = {"THUDM/chatglm2-6b": hub.repositories["zai-org/chatglm2-6b"]}
    done = resolve("zai-org/chatglm2-6b", hub, tmp_path)
    assert "models--THUDM--chatglm2-6b" in done.stdout
    hub.repositories["zai-org/chatglm2-6b"] = hub.repositories["THUDM/chatglm2-6b"]
    sent = len(hub.files_sent)
    # What the cache has is not fetched again.
    assert resolve("chatglm2-6b", hub, tmp_path).stdout == done.stdout
    assert len(hub.files_sent) == sent


def test_pickles_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    files = hub.repositories["zai-org/chatglm2-6b"]
    hub.repositories["zai-org/chatglm2-6b"] = {
        name: content for name, content in files.items() if "safetensors" not in name
    }
    folder = Path(resolve("chatglm2-6b", hub, tmp_path).stdout.strip())
    assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.model", "pytorch_model.bin"}
    assert resolve("chatglm2-6b", hub, tmp_path, offline=True).stdout.strip() == str(folder)


def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    missing = resolve("THUDM/chatglm9-6b", hub, tmp_path)
    assert missing.returncode == 1
    for words in ("`zai-org/chatglm9-6b` and `THUDM/chatglm9-6b` are not on the hub", "chatglm2-6b"):
        assert words in missing.stderr
    hub.gated = {"zai-org/chatglm2-6b"}
    gated = resolve("chatglm2-6b", hub, tmp_path)
    assert "`zai-org/chatglm2-6b` is gated" in gated.stderr
    assert "hf auth login" in gated.stderr
    cold = resolve("chatglm3-6b", hub, tmp_path, offline=True)
    assert "`zai-org/chatglm3-6b` and `THUDM/chatglm3-6b` could not be downloaded" in cold.stderr
    assert "HF_HUB_OFFLINE=1" in cold.stderr
    assert all("Traceback" not in done.stderr for done in (missing, gated, cold))
    assert hub.files_sent == []


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    done = resolve("chatglm2-6b", Hub(url="http://127.0.0.1:9"), tmp_path)
    assert "could not be downloaded and are not in the local cache" in done.stderr
    assert "HF_ENDPOINT" in done.stderr


def test_modelscope_is_refused_by_name_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingExtraError, match=r"`modelscope:chatglm2-6b` needs .*glmtune\[modelscope\]"):
        resolve_source("modelscope:chatglm2-6b")
    with pytest.raises(ConfigError, match=r"`modelscope:meta/llama`, but after `modelscope:`"):
        resolve_source("modelscope:meta/llama")


@pytest.mark.parametrize("source", ["modelscope:chatglm3-6b", "modelscope:ZhipuAI/chatglm3-6b"])
def test_modelscope_with_its_package(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def snapshot_download(model_id: str, *, allow_patterns: list[str]) -> str:
        calls.append((model_id, allow_patterns))
        return str(tmp_path)

    package = types.ModuleType("modelscope")
    monkeypatch.setattr(package, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "modelscope", package)
    assert resolve_source(source) == tmp_path
    assert [model_id for model_id, _ in calls] == ["ZhipuAI/chatglm3-6b"] * 2
    assert not any(".py" in pattern for _, patterns in calls for pattern in patterns)
    assert family_of_source(source) == Family.CHATGLM3

    def fail(*_: object, **__: object) -> str:
        raise ValueError("no such model")

    monkeypatch.setattr(package, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"`ZhipuAI/chatglm3-6b` could not be .*no such model"):
        resolve_source(source)
