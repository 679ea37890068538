"""Which layers of a model become codes, and why the others do not.

Decided by the names in the checkpoint and shapes alone, before any weight is read: every way to quantize (on
loading, in memory, calibrated) and the memory planner follow the same plan. The linear layers of blocks are
taken: they hold about nine tenths of the weights. Embedding and head are taken where that is asked for: in
INT8, or in the width of the blocks, for which only the first generation has an official format.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glmtune.errors import ConfigError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.checkpoints.names import Entry, name_table
from glmtune.models.checkpoints.quantized_layout import (
    BLOCK_LINEARS,
    INT8_EMBEDDINGS,
    TRANSFORMERS_LINEARS,
    QuantizedLayout,
    without_layout,
)
from glmtune.models.checkpoints.transformers_format import is_transformers_format
from glmtune.quantization.arithmetic.methods import method_named

KEPT = "outside the blocks"
SKIPPED = "named in `skip`"


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer with a matrix.

    Attributes:
        name: official name.
        entry: its weight in the table of names.
        reason: why it stays as it is; "": it becomes codes.
    """

    name: str
    entry: Entry
    reason: str


def plan_layout(
    config: Any, method: str, *, skip: Sequence[str] = (), embeddings: bool | str = False
) -> QuantizedLayout:
    """Decide how a model is stored when quantized.

    Args:
        config: as made by `native_config`.
        method: a name in ``METHODS``.
        skip: official names of layers to leave, or patterns of them (``*.dense_4h_to_h``), or names of kinds.
        embeddings: ``int8``: embedding and head become INT8, too. True: the embedding and the head tied to it
            become codes as the blocks do.

    Raises:
        ConfigError: unknown method; a pattern that no layer has; embeddings that no format can hold; 4 bits
            for a layer with an odd number of input columns.
    """
    chosen = method_named(method)
    plain = plain_config(config)
    kinds = TRANSFORMERS_LINEARS if is_transformers_format(config) else BLOCK_LINEARS
    linears = [name for name, _ in _matrices(plain) if name.rpartition(".")[2] in kinds]
    skipped: set[str] = set()
    for pattern in skip:
        found = [name for name in linears if fnmatch.fnmatch(name, pattern) or name.endswith(f".{pattern}")]
        if not found:
            raise ConfigError(
                f"`skip` names `{pattern}`, but no linear layer of a block is called so. "
                f"Layers: {linears[0]}, ... (kinds: {', '.join(kinds)}; `*` stands for anything)."
            )
        skipped.update(found)
    if embeddings is True and not isinstance(config, ChatGlmConfig):
        raise ConfigError(
            "`embeddings` is true, but only ChatGLM-6B has an official format for quantized embeddings. Use "
            f"`{INT8_EMBEDDINGS}`, which every model can have, or leave it out."
        )
    layout = chosen.layout(method, embeddings=embeddings, skipped=tuple(n for n in linears if n in skipped))
    for name, entry in _matrices(plain):
        if layout.holds(name) and layout.of_layer(name).bits == 4 and entry.shape[1] % 2:
            raise ConfigError(
                f"`quantization` is `{method}`, but {name} has {entry.shape[1]} input columns, and 4 bits "
                "need an even number: a byte holds two. Use `int8`, or leave this layer out (`skip`)."
            )
    return layout


def planned_layers(config: Any, layout: QuantizedLayout) -> tuple[PlannedLayer, ...]:
    """List every layer with a matrix.

    Args:
        config: as made by `native_config`.
        layout: from `plan_layout`, or of a stored checkpoint.
    """
    layers = []
    for name, entry in _matrices(plain_config(config)):
        reason = "" if layout.holds(name) else SKIPPED if name in layout.skipped else KEPT
        layers.append(PlannedLayer(name, entry, reason))
    return tuple(layers)


def _matrices(plain: Any) -> list[tuple[str, Entry]]:
    return [
        (entry.official.removesuffix(".weight"), entry)
        for entry in name_table(plain)
        if entry.official.endswith(".weight") and len(entry.shape) == 2
    ]


def plain_config(config: Any) -> Any:
    """Return a copy of a configuration without its quantized layout.

    The table of names lists scales as tensors of their own where a configuration has
    a layout; a plan is about weights.
    """
    plain = copy.copy(config)
    without_layout(plain)
    return plain
