"""Small official checkpoints of both architectures, in float16, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
GOLDEN = REPO / "tests" / "golden" / "models"
GENERATIONS = ("chatglm", "chatglm2", "per-head", "glm4")


@pytest.fixture(params=GENERATIONS)
def source(request: pytest.FixtureRequest) -> Path:
    """Each architecture: fused rows by head (first and per-head) or by kind."""
    return GOLDEN / request.param


@pytest.fixture
def spoil(tmp_path: Path) -> Callable[..., Path]:
    """Copy a checkpoint of one file, changing its tensors and config.json."""

    def make(
        folder: Path, change: Callable[[dict[str, Tensor]], object], config: dict[str, object] | None = None
    ) -> Path:
        target = tmp_path / "spoilt"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        target.chmod(0o755)
        tensors: dict[str, Tensor] = {}
        for file in sorted(target.iterdir()):
            file.chmod(0o644)
            if not file.name.startswith(("model", "pytorch_model")):
                continue
            if file.suffix == ".bin":
                tensors |= torch.load(file, weights_only=True)
            elif file.suffix == ".safetensors":
                tensors |= load_file(file)
            if file.suffix in (".bin", ".safetensors") or file.name.endswith(".index.json"):
                file.unlink()
        change(tensors)
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
            target / "model.safetensors",
        )
        described = json.loads((target / "config.json").read_text()) | (config or {})
        (target / "config.json").write_text(
            json.dumps({key: value for key, value in described.items() if value is not None})
        )
        return target

    return make
