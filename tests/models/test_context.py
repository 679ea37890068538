"""How many tokens a model takes, read without PyTorch: the number that the loaded configuration has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from glmtune.errors import CheckpointError
from glmtune.models.context import context_tokens
from glmtune.models.load import load_config
from glmtune.models.releases.source import resolve_source

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "models"
FOLDERS = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "config.json").is_file())


@pytest.mark.parametrize("name", [*FOLDERS, "glm-tiny"])
def test_it_is_that_of_the_configuration(name: str) -> None:
    source = str(GOLDEN / name) if name in FOLDERS else name
    expected = load_config(source, resolve_source(source)).max_position_embeddings
    assert context_tokens(source) == expected


def test_a_file_that_does_not_name_it_is_refused_as_on_loading(tmp_path: Path) -> None:
    folder = tmp_path / "chatglm-6b"
    shutil.copytree(GOLDEN / "chatglm", folder)
    content = json.loads((folder / "config.json").read_text())
    del content["max_sequence_length"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="max_sequence_length is missing; every official file has it"):
        context_tokens(folder)
