from __future__ import annotations

from pathlib import Path

import pytest

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.releases import source as source_module
from glmtune.models.releases.families import Family, family_of_name
from glmtune.models.releases.presets import PRESETS
from glmtune.models.releases.source import family_of_source, resolve_source


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
    with pytest.raises(ConfigError, match=r"`runs/none`.*no such folder.*zai-org/ and THUDM/"):
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
        assert preset.hub_id.lower() == f"zai-org/{name}"
        assert preset.summary
        assert (family_of_name(name) or Family.CHATGLM) == preset.family
        assert family_of_source(name) == preset.family
    assert family_of_source("zai-org/chatglm2-6b-32k") == Family.CHATGLM2_32K
    assert family_of_source("glm-tiny") is None
