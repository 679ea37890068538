"""Models whose weights have their shapes but no memory yet, and the files that will fill them.

Processes that divide a model among them never hold it whole: each makes a hollow one, and keeps its part of
every tensor that passes by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.reading import Opened, check_records, read_into
from glmtune.models.checkpoints.shards import read_records
from glmtune.models.glm import OfficialGlmForCausalLM
from glmtune.models.load import build_model, choose_dtype, load_config
from glmtune.models.official import sampled_signs, signs_fingerprint
from glmtune.models.releases.source import resolve_source

if TYPE_CHECKING:
    from glmtune.models.load import GlmModel

_STORED = "_glmtune_stored"


@dataclass(frozen=True)
class Stored:
    """Weights on disk that a hollow model waits for.

    Attributes:
        folder: an official checkpoint.
        config: as made by `native_config`; says how the checkpoint stores its weights.
    """

    folder: Path
    config: Any

    def fill(self, model: nn.Module, opened: Opened) -> None:
        """Read every tensor once.

        Args:
            model: whose parameters they are, adapters around them or not.
            opened: see `read_into`.

        Raises:
            CheckpointError: see `read_into`; or a file cannot be read.
        """
        try:
            read_into(model, self.folder, self.config, opened=opened)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: weights cannot be read ({error}). Check the disk and fetch the file again."
            ) from error

    def fingerprint(self) -> str:
        """Return `OfficialModel.fingerprint` of the weights, with one tensor at a time in memory."""
        with torch.device("meta"):
            shapes = {name: weight.shape for name, weight in build_model(self.config).named_parameters()}
        signs: dict[str, bytes] = {}

        @contextmanager
        def sampled(names: Sequence[str]) -> Iterator[list[Tensor]]:
            whole = [torch.empty(shapes[name]) for name in names]
            yield whole
            signs.update({name: sampled_signs(weight) for name, weight in zip(names, whole, strict=True)})

        self.fill(nn.Module(), sampled)
        return signs_fingerprint(self.config, signs)


def load_hollow(source: str | Path, *, dtype: str | None, family: str | None = None) -> GlmModel:
    """Make a model that waits for its weights: they are NaN, and all numbers of a tensor are one in memory.

    Args:
        source: see `glmtune.models.load.load_base`.
        dtype: see there; on a CPU.
        family: release line, None to detect it.

    Returns:
        As `load_base`, with `waits_for`.

    Raises:
        ConfigError: see `load_base`; so is CheckpointError.
    """
    folder = resolve_source(source)
    config = load_config(source, folder, family)
    assert QuantizedLayout.of(config) is None, "codes are not divided"
    check_records(read_records(folder), config, folder)
    with torch.device("meta"):
        model = build_model(config)
    count = model.num_parameters()
    kind = choose_dtype(dtype, torch.device("cpu"), stored=config.dtype, num_parameters=count)
    stored = Stored(folder, config)
    model.config.dtype = kind
    model._apply(lambda tensor: nothing(tensor.shape, kind if tensor.is_floating_point() else tensor.dtype))
    model.tie_weights()
    if isinstance(model, OfficialGlmForCausalLM):
        model.rebuild_rotary()
    model.source = str(source)
    wait_for(model, stored)
    return model.eval()


def is_quantized(source: str | Path, family: str | None = None) -> bool:
    """Tell whether a checkpoint holds codes, by its config.json.

    Raises:
        ConfigError: see `load_hollow`; so is CheckpointError.
    """
    return QuantizedLayout.of(load_config(source, resolve_source(source), family)) is not None


def nothing(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of a shape whose numbers all are one number in memory: NaN, so that none is used."""
    return torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype).expand(tuple(shape))


def is_nothing(tensor: Tensor) -> bool:
    """Tell whether a tensor is of `nothing`."""
    return tensor.numel() > 1 and not any(tensor.stride())


def wait_for(model: nn.Module, stored: Stored | None) -> None:
    """Note where the weights of a hollow model will come from; None: they have come."""
    owner = next((module for module in model.modules() if _STORED in vars(module)), model)
    setattr(owner, _STORED, stored)


def waits_for(model: nn.Module) -> Stored | None:
    """Return where a model's weights will come from; None if it has them."""
    return next((vars(module)[_STORED] for module in model.modules() if _STORED in vars(module)), None)
