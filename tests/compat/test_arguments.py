"""What users hand to ``from_pretrained``: obeyed, satisfied, or refused with what to write; nothing is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.compat.arguments import INSTEAD, QUANTIZED, SATISFIED, check_typed
from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_model

BASE: dict[str, Any] = {"dtype": None, "quantization": None}


def test_obeyed(tiny_base: Path) -> None:
    model = load_model(
        tiny_base,
        torch_dtype=torch.float16,
        load_in_8bit=True,
        load_in_4bit=False,
        device_map="cpu",
        attn_implementation="eager",
        trust_remote_code=True,
        low_cpu_mem_usage=True,
        revision="main",
    )
    assert model.dtype == torch.float16
    assert model.quantization == "int8"
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", sorted(SATISFIED))
def test_satisfied(name: str) -> None:
    assert check_typed("some/folder", BASE, {name: True}) == ("some/folder", BASE)
    assert len(SATISFIED[name]) > 5


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_refused_with_what_to_write(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"`{name}=1` is not an argument here. [A-Z].*\w"):
        check_typed("some/folder", BASE, {name: 1})


def test_unknown() -> None:
    with pytest.raises(ConfigError, match=r"`torch_dtyp`, which does not exist. Did you mean `torch_dtype`"):
        check_typed("some/folder", BASE, {"torch_dtyp": "float16"})


def test_the_same_said_twice() -> None:
    with pytest.raises(ConfigError, match=r"`load_in_8bit` asks for quantization `int8`.*`int4` already"):
        check_typed("some/folder", {"quantization": "int4"}, {"load_in_8bit": True})
    with pytest.raises(ConfigError, match=r"`load_in_4bit` asks for .*`int8` already"):
        check_typed("some/folder", BASE, dict.fromkeys(QUANTIZED, True))
    with pytest.raises(
        ConfigError, match=r"`torch_dtype` asks for dtype `float16`, but `dtype` is `float32`"
    ):
        check_typed("some/folder", {"dtype": "float32"}, {"torch_dtype": "float16"})


def test_arguments_of_the_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options))
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source, options = check_typed(
        "THUDM/chatglm2-6b-32k",
        BASE,
        {"revision": "v1.0", "cache_dir": str(tmp_path), "token": None, "force_download": False},
    )
    assert source == tmp_path
    assert options["family"] == "chatglm2-32k"
    assert asked[0][1]["revision"] == "v1.0"
    assert asked[0][1]["cache_dir"] == str(tmp_path)
    assert set(asked[0][1]) == {"allow_patterns", "revision", "cache_dir"}


def test_a_folder_has_no_revision(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"`revision` is `v1.0`, but .* is not a model on the hub"):
        load_model(tiny_base, revision="v1.0")
    assert check_typed(tiny_base, BASE, {"cache_dir": "x", "local_files_only": True}) == (tiny_base, BASE)


def test_a_revision_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    class Absent(RevisionNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def snapshot(*_: Any, **__: Any) -> str:
        raise Absent

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=r"`zai-org/chatglm2-6b` has no revision `nine`"):
        check_typed("chatglm2-6b", BASE, {"revision": "nine"})
