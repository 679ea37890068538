"""The cases of one released architecture, and the model that is held to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glmtune.models.load import load_official

Model = TypeVar("Model")
LOGITS, LOSS, GRADIENT, STEP_LOSS = 1e-4, 2e-5, 1e-5, 5e-5
"""The tolerances that the oracles state."""


@dataclass
class Oracle(Generic[Model]):
    """A model in float32 beside what the released code made of the same weights and inputs."""

    name: str
    model: Model
    tensors: dict[str, Tensor]
    cases: dict[str, Any]

    def __call__(self, case: str, tensor: str) -> Tensor | None:
        """Return a tensor of a case; None where the case has none of that name."""
        return self.tensors.get(f"{case}.{tensor}")

    def need(self, case: str, tensor: str) -> Tensor:
        """Return a tensor that the case has."""
        return self.tensors[f"{case}.{tensor}"]

    def value(self, case: str, name: str) -> Any:
        """Return a plain value of a case."""
        return self.cases[case]["values"][name]

    def inputs(self, case: str, *, positions: bool = True) -> dict[str, Tensor]:
        """Return what the model is given; a case that the architecture has not is skipped."""
        if case not in self.cases:
            pytest.skip(f"{self.name} has no {case}")
        names = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]
        return {name: value for name in names if (value := self(case, name)) is not None}


def read_oracle(folder: Path, checkpoint: str, attention: str) -> Oracle[Any]:
    """Load the model of a folder and its cases."""
    model = load_official(
        folder / checkpoint, dtype=torch.float32, device="cpu", attn_implementation=attention
    )
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    return Oracle(folder.name, model, load_file(folder / "cases.safetensors"), cases)


def close(actual: Tensor, expected: Tensor, tolerance: float = LOGITS) -> None:
    """Assert that no number is off by more than the tolerance."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
