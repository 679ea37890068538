"""Weights to the bytes of a type, and back; some thousand weights at a time.

Q8_0, Q4_0 and Q5_0 are the `gguf` package's own, and so is reading everything back; it has no way to write
Q4_K and Q6_K, which `glmtune.export.gguf.k_quants` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmtune.errors import CheckpointError
from glmtune.export.gguf.k_quants import BLOCK, quantize_q4_k, quantize_q6_k
from glmtune.export.gguf.types import gguf_package, num_bytes

CHUNK = 2**16
"""Weights converted at a time, for each of PyTorch's threads: the search for scales goes through them some
two hundred times, and is twice as fast while they and what it holds beside them stay in a core's cache."""
LARGEST_HALF = 65504.0


def encode(name: str, weight: Tensor, kind: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of a tensor.

    Args:
        name: for messages.
        weight: ``[O, I]`` or ``[O]``, any floating type.
        kind: key of ``BLOCKS``.

    Returns:
        uint8, one after the other as they stand in the file.

    Raises:
        CheckpointError: weights that are no numbers, or too large for F16.
    """
    out = np.empty(num_bytes(tuple(weight.shape), kind), dtype=np.uint8)
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, CHUNK * torch.get_num_threads() // rows.shape[1])
    place = 0
    for start in range(0, len(rows), step):
        part = rows[start : start + step].float().contiguous()
        _check_numbers(name, part, kind)
        encoded = _encode_rows(part, kind)
        out[place : place + len(encoded)] = encoded
        place += len(encoded)
    assert place == len(out)
    return out


def decode(content: np.ndarray[Any, Any], kind: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weights behind the bytes of a tensor, as the `gguf` package reads them.

    Args:
        content: as `encode` made it, of any view.
        kind: key of ``BLOCKS``.
        shape: of the tensor.

    Returns:
        float32.
    """
    gguf = gguf_package()
    rows = np.ascontiguousarray(content).view(np.uint8).reshape(shape[0] if len(shape) == 2 else 1, -1)
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values if values.flags.writeable else values.copy()).reshape(shape)


def _check_numbers(name: str, rows: Tensor, kind: str) -> None:
    largest = float(rows.abs().max()) if rows.numel() else 0.0
    if not np.isfinite(largest):
        raise CheckpointError(
            f"The tensor {name} holds numbers that are infinite or none at all, so nothing can be made of "
            "it. Check the checkpoint, or the run it is of."
        )
    # The other types but BF16 and F32 have scales in float16, which are some ten times smaller.
    if largest > LARGEST_HALF and kind not in ("F32", "BF16"):
        raise CheckpointError(
            f"The tensor {name} holds {largest:.3g}, but {kind} has no numbers above {LARGEST_HALF:.0f}. Use "
            "`gguf_type=BF16`."
        )


def _encode_rows(rows_OI: Tensor, kind: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if kind == "F32":
        return rows_OI.numpy().view(np.uint8).reshape(-1)
    if kind in ("F16", "BF16"):
        made = rows_OI.to(torch.float16 if kind == "F16" else torch.bfloat16)
        return made.view(torch.uint8).numpy().reshape(-1)
    if kind == "Q4_K":
        return quantize_q4_k(rows_OI.view(-1, 8, BLOCK // 8)).numpy().reshape(-1)
    if kind == "Q6_K":
        return quantize_q6_k(rows_OI.view(-1, 16, BLOCK // 16)).numpy().reshape(-1)
    gguf = gguf_package()
    return gguf.quants.quantize(rows_OI.numpy(), gguf.GGMLQuantizationType[kind]).reshape(-1)
