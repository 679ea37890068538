"""The types of a GGUF file: what users ask for, and which type each tensor then gets.

As `llama-quantize` of llama.cpp gives them, so that a file of ours is as large and as good as one of its own:
numbers that count most (the head, some layers' values and down projections) get more bits than the name of
the type says.

Source:
    ``src/llama-quant.cpp`` of llama.cpp, the rules for Q4_0, Q8_0 and Q4_K_M without an importance matrix.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from glmtune.errors import MissingExtraError


@dataclass(frozen=True, slots=True)
class FileType:
    """A type of file that users can ask for.

    Attributes:
        number: ``general.file_type`` of llama.cpp.
        usual: type of most matrices.
        spacing: how coarse its numbers are beside 1, for the comparison of logits.
        max_error: largest relative error (root mean square) that rounding a tensor can make, for any weights.
        smallest: what a weight may be off beside that, where a float16 (of a scale) has no finer numbers.
    """

    number: int
    usual: str
    spacing: float
    max_error: float
    smallest: float = 0.0


FILE_TYPES: dict[str, FileType] = {
    "F32": FileType(0, "F32", 2**-23, 2**-23),
    "F16": FileType(1, "F16", 2**-10, 2**-10, 6e-8),
    "BF16": FileType(32, "BF16", 2**-7, 2**-7),
    "Q8_0": FileType(7, "Q8_0", 2**-6, 0.03, 4e-6),
    "Q4_K_M": FileType(15, "Q4_K", 2**-4, 0.4, 3e-5),
    "Q4_0": FileType(2, "Q4_0", 2**-4, 0.4, 3e-5),
}
"""Name → what it is; the finest first."""
DEFAULT_TYPE = "F16"

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q5_0": (32, 22),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
}
"""Type of a tensor → weights in a block, and bytes that a block takes."""
SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""Taken where a row is no whole number of blocks of 256."""
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def tensor_type(
    name: str, shape: tuple[int, ...], file_type: str, *, num_layers: int, head_is_tied: bool
) -> str:
    """Return the type of one tensor, a key of ``BLOCKS``.

    Args:
        name: in the file.
        shape: rows and columns, or rows alone.
        file_type: key of ``FILE_TYPES``.
        num_layers: blocks of the model.
        head_is_tied: the embedding is the head, too.

    >>> tensor_type("blk.0.attn_norm.weight", (4096,), "F16", num_layers=40, head_is_tied=False)
    'F32'
    >>> tensor_type("blk.0.ffn_down.weight", (4096, 13696), "Q4_K_M", num_layers=40, head_is_tied=False)
    'Q8_0'
    """
    if len(shape) == 1:
        return "F32"  # norms and biases: small, and llama.cpp computes with them in float32
    wanted = _wanted(name, file_type, num_layers, head_is_tied)
    if shape[1] % BLOCKS[wanted][0]:
        wanted = SMALLER_BLOCKS.get(wanted, "F16")
    return wanted if shape[1] % BLOCKS[wanted][0] == 0 else "F16"


def _wanted(name: str, file_type: str, num_layers: int, head_is_tied: bool) -> str:
    """Return the type before the length of a row is looked at."""
    usual = FILE_TYPES[file_type].usual
    if not usual.startswith("Q"):
        return usual
    is_head = name == "output.weight" or (head_is_tied and name == "token_embd.weight")
    if is_head:
        return "Q8_0" if usual == "Q8_0" else "Q6_K"
    match = _LAYER.fullmatch(name)
    if file_type != "Q4_K_M" or match is None:
        return usual
    layer, part = int(match[1]), match[2]
    if part in ("attn_v", "attn_qkv", "ffn_down") and _gets_more_bits(layer, num_layers):
        return "Q6_K"
    return usual


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """Whether a layer is of the first or last eighth, or every third of those between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def num_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Return how many bytes a tensor takes in the file.

    >>> num_bytes((2, 64), "Q8_0")
    136
    """
    per_block, size = BLOCKS[kind]
    rows = shape[0] if len(shape) == 2 else 1
    return rows * (shape[-1] // per_block) * size


def gguf_package() -> Any:
    """Import the `gguf` package, which belongs to an extra.

    By name, as a plain import would look like one of this package of ours.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise MissingExtraError("`format=gguf`", extra="gguf") from None
