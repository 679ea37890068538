"""The golden prefix-tuning cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Golden:
    """The prefix-tuning cases of one released architecture."""

    folder: Path
    tensors: dict[str, Tensor]
    values: dict[str, dict[str, object]]

    def case(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one case by their short names."""
        start = name + "."
        return {key[len(start) :]: tensor for key, tensor in self.tensors.items() if key.startswith(start)}

    def inputs(self, name: str) -> dict[str, Tensor]:
        """Return what the model is given in one case."""
        keys = ("input_ids", "attention_mask", "position_ids", "labels")
        return {key: tensor for key, tensor in self.case(name).items() if key in keys}


@pytest.fixture(scope="session")
def golden(oracles: Path) -> Callable[[str], Golden]:
    """Load the cases of an architecture by its directory name."""

    def load(architecture: str) -> Golden:
        folder = oracles / architecture
        described = json.loads((folder / "ptuning.json").read_text(encoding="utf-8"))["cases"]
        values = {name: case.get("values", {}) for name, case in described.items()}
        return Golden(folder, load_file(folder / "ptuning.safetensors"), values)

    return load


@pytest.fixture(params=["embedding", "projection"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each form of the prefix encoder: a table, and a table with an MLP behind it."""
    return request.param
