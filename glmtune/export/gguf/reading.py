"""Read a GGUF file back: what it says of the model, and the weights behind its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Glm4Config, GlmConfig

from glmtune.errors import CheckpointError
from glmtune.export.gguf.encoding import decode
from glmtune.export.gguf.hyperparameters import Hyperparameters
from glmtune.export.gguf.types import BLOCKS, gguf_package
from glmtune.models.checkpoints.shard_writer import LazyTensors


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file's content.

    Attributes:
        values: key → value, arrays as lists.
        hyperparameters: sizes and positions.
        tensors: name in the file → weights, float32, made when they are asked for.
        kinds: name in the file → type.
    """

    values: dict[str, Any]
    hyperparameters: Hyperparameters
    tensors: LazyTensors
    kinds: dict[str, str]

    def config(self) -> GlmConfig | Glm4Config:
        """Return transformers' configuration of the model."""
        return self.hyperparameters.config(
            attention_bias=any(
                name.endswith("attn_qkv.bias") or "attn_q.bias" in name for name in self.kinds
            ),
            tie_word_embeddings="output.weight" not in self.kinds,
        )


def read_gguf(file: Path) -> GgufFile:
    """Open a file; the weights stay on disk.

    Args:
        file: as `write_gguf` wrote it.

    Raises:
        CheckpointError: keys are missing, or a tensor has a type that no file of ours has.
    """
    reader = gguf_package().GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    makers, shapes, kinds = {}, {}, {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in BLOCKS:
            raise CheckpointError(f"{file}: {tensor.name} has the type {kind}, which no file of ours has.")
        # The file counts a row's numbers first, then the rows.
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        makers[tensor.name] = partial(_read, file, tensor.data_offset, tensor.n_bytes, kind, shape)
        shapes[tensor.name], kinds[tensor.name] = shape, kind
    return GgufFile(
        values,
        Hyperparameters.from_keys(values["general.architecture"], values),
        LazyTensors(makers, shapes),
        kinds,
    )


def _read(file: Path, offset: int, size: int, kind: str, shape: tuple[int, ...]) -> Tensor:
    # Not through the reader's map of the file: its pages would stay in memory, in the end all of them.
    return decode(np.fromfile(file, dtype=np.uint8, count=size, offset=offset), kind, shape)
