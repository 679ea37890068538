"""On which devices the tests of this folder run: a GPU, or, in a dry run of `scripts/gpu_check.sh`, the CPU."""

from __future__ import annotations

import os

import pytest
import torch

DRY_RUN = "GLMTUNE_GPU_DRY_RUN"
"""Set by a dry run. Other runs of the suite leave the CPU out: `tests/contract/test_gpu_check.py` is a dry run."""

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            DRY_RUN not in os.environ, reason="runs in test_gpu_check.py, which is a dry run"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)
"""The same body on both."""
