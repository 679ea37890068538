"""Tensors of weight files, one at a time, for tests that look at files."""

from __future__ import annotations

from torch import Tensor

from glmtune.models.checkpoints.headers import TensorRecord
from glmtune.models.checkpoints.shards import OpenShards


def read_tensor(record: TensorRecord) -> Tensor:
    """Open a file, read one tensor and close it."""
    with OpenShards() as shards:
        return shards.read(record)
