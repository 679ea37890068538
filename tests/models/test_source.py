from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models import source as source_module
from glmtune.models.families import Family, family_of_name
from glmtune.models.presets import PRESETS
from glmtune.models.source import family_of_source, resolve_source


class FakeHub:
    """Stands for huggingface_hub.snapshot_download."""

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self.folder, self.calls = folder, []
        for file in files:
            (folder / file).touch()

    def __call__(self, hub_id: str, *, allow_patterns: list[str]) -> str:
        self.calls.append((hub_id, allow_patterns))
        return str(self.folder)


@pytest.mark.parametrize(
    ("index", "weights"),
    [
        (("model.safetensors.index.json", "pytorch_model.bin.index.json"), ["model*.safetensors"]),
        (("pytorch_model.bin.index.json",), ["pytorch_model*.bin"]),
        ((), ["model*.safetensors", "pytorch_model*.bin"]),
    ],
)
@pytest.mark.parametrize(
    ("source", "hub_id"),
    [
        ("chatglm2-6b", "zai-org/chatglm2-6b"),
        ("THUDM/chatglm3-6b", "THUDM/chatglm3-6b"),
        ("zai-org/glm-4-9b", "zai-org/glm-4-9b"),
    ],
)
def test_download_takes_one_weight_format_and_no_code(
    source: str,
    hub_id: str,
    index: tuple[str, ...],
    weights: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub(tmp_path, index)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_source(source) == tmp_path
    small = ["*.json", "*.model", "*.txt"]
    assert hub.calls == [(hub_id, small), (hub_id, small + weights)]
    assert not any(".py" in pattern for _, patterns in hub.calls for pattern in patterns)


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no snapshot on disk")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"`zai-org/chatglm3-6b` could not be .*no snapshot on disk.*HF_ENDPOINT"
    ):
        resolve_source("chatglm3-6b")


def test_a_repository_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RepositoryNotFoundError.__new__(
            RepositoryNotFoundError
        )  # its constructor wants a live response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"`THUDM/chatglm9-6b` is not on the hub, or needs a login.*chatglm2-6b"
    ):
        resolve_source("THUDM/chatglm9-6b")


def test_folders_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "最好的 model"
    folder.mkdir()
    assert resolve_source(folder) == folder
    assert resolve_source(str(folder)) == folder
    (tmp_path / "THUDM" / "chatglm2-6b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_source("THUDM/chatglm2-6b") == Path("THUDM/chatglm2-6b")
    assert family_of_source("THUDM/chatglm2-6b") is None


def test_unknown_names_list_the_nearest_first() -> None:
    with pytest.raises(ConfigError, match=r"`model.source` is `chatglm2-6`, .*Did you mean `chatglm2-6b`"):
        resolve_source("chatglm2-6")
    with pytest.raises(ConfigError, match=r"`runs/none`.*no such folder.*THUDM/ and zai-org/"):
        resolve_source("runs/none")
    with pytest.raises(ConfigError, match=r"`meta/llama`.*no such folder"):
        resolve_source("meta/llama")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.touch()
    with pytest.raises(ConfigError, match=r"is the file .*must be a folder"):
        resolve_source(file)


def test_missing_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match=r"glm-tiny is not in this installation.*pretrain_tiny"):
        resolve_source("glm-tiny")
    (tmp_path / "glm-tiny").mkdir()
    (tmp_path / "glm-tiny" / "config.json").touch()
    assert resolve_source("glm-tiny") == tmp_path / "glm-tiny"


def test_presets_agree_with_their_names() -> None:
    for name, preset in PRESETS.items():
        if preset.hub_id is None:
            continue
        assert preset.hub_id == f"zai-org/{name}"
        assert preset.summary
        assert (family_of_name(name) or Family.CHATGLM) == preset.family
        assert family_of_source(name) == preset.family
    assert family_of_source("zai-org/chatglm2-6b-32k") == Family.CHATGLM2_32K
    assert family_of_source("glm-tiny") is None
