"""Models of placeholder tensors: every shape is there, the weights are still on disk.

A placeholder is one NaN, expanded to the shape (stride 0), so a 6B model costs bytes. Unlike a meta tensor it
is on a real device: prefixes, adapters and optimizers take it for a weight, and a forward pass that runs into
a forgotten one gives NaN instead of plausible numbers.

Two use them: sharded loading (`load_placeholders`: processes keep their shard of each tensor as it is read,
none ever holds the whole model) and `glmtune.export` (weights are read module by module, as each runs).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.fingerprint import sampled_signs, signs_fingerprint
from glmtune.models.checkpoints.names import name_table
from glmtune.models.checkpoints.quantized_layout import QuantizedLayout
from glmtune.models.checkpoints.reading import Destination, check_records, read_weights
from glmtune.models.checkpoints.shards import is_verifying, read_records, verifying
from glmtune.models.devices import choose_dtype
from glmtune.models.generation import release_generation
from glmtune.models.load import GlmModel, build_model, check_written, load_config
from glmtune.models.releases.source import resolve_source

Model = TypeVar("Model", bound=PreTrainedModel)
_PENDING = "_glmtune_pending_weights"


@dataclass(frozen=True)
class PendingWeights:
    """Weights on disk that a model of placeholders will be filled with.

    Attributes:
        folder: an official checkpoint of floating point weights.
        config: as made by `native_config`; says how the checkpoint stores its weights.
        verifies: whether checksums are compared; see `verifying`.
    """

    folder: Path
    config: Any
    verifies: bool = True

    def read(self, destination: Destination) -> None:
        """Read every tensor once.

        Args:
            destination: where they are written to; see there.

        Raises:
            CheckpointError: see `read_into`; or a file cannot be read.
        """
        try:
            with verifying(self.verifies):
                read_weights(self.folder, self.config, destination)
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
        def sampled(names: Sequence[str]) -> Generator[list[Tensor]]:
            whole = [torch.empty(shapes[name]) for name in names]
            yield whole
            signs.update({name: sampled_signs(weight) for name, weight in zip(names, whole, strict=True)})

        self.read(sampled)
        return signs_fingerprint(self.config, signs)


def load_placeholders(source: str | Path, *, dtype: str | None, family: str | None = None) -> GlmModel:
    """Make a model of placeholders on the CPU, and note which weights it is to be filled with.

    Args:
        source: see `glmtune.models.load.load_official`; an unquantized checkpoint.
        dtype: see there.
        family: release line, None to detect it.

    Returns:
        As `load_official`, with `pending_weights`.

    Raises:
        ConfigError: see `load_official`; so is CheckpointError.
    """
    folder = resolve_source(source)
    check_written(folder)
    config = load_config(source, folder, family)
    assert QuantizedLayout.of(config) is None, "codes are not sharded"
    # Now rather than when the weights are read: by then processes wait for each other, and rows are encoded.
    check_records(read_records(folder), config, folder)
    count = sum(torch.Size(entry.shape).numel() for entry in name_table(config) if not entry.is_copy)
    resolved_dtype = choose_dtype(dtype, torch.device("cpu"), stored=config.dtype, num_parameters=count)
    model = build_of_placeholders(lambda: build_model(config), resolved_dtype)
    model.config.dtype = resolved_dtype
    model.source = str(source)
    model.generation_config = release_generation(folder, model.config)
    set_pending_weights(model, PendingWeights(folder, config, is_verifying()))
    return model


def build_of_placeholders(build: Callable[[], Model], dtype: torch.dtype = torch.float32) -> Model:
    """Build a model whose parameters are placeholders.

    Args:
        build: makes the model; its buffers (rotary tables) are made as usual, for no file holds them.
        dtype: of the parameters.

    Returns:
        The model on the CPU, in evaluation mode.
    """
    with init_empty_weights(include_buffers=False):
        model = build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(placeholder(parameter.shape, dtype)))
    model.tie_weights()  # a tied head has just been given a placeholder of its own
    return model.eval()


def placeholder(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of NaN whose elements are all one element in memory.

    Args:
        shape: any.
        dtype: a floating type.
    """
    return torch.full((), float("nan"), dtype=dtype).expand(tuple(shape))


def is_placeholder(tensor: Tensor) -> bool:
    """Tell whether a tensor is of `placeholder`."""
    return tensor.numel() > 1 and not any(tensor.stride())


def set_pending_weights(model: nn.Module, pending: PendingWeights | None) -> None:
    """Note which weights a model of placeholders is to be filled with; None: it has been."""
    # PEFT and trainers wrap the model: the note stays on the module that has it, whoever is asked.
    owner = next((module for module in model.modules() if _PENDING in vars(module)), model)
    setattr(owner, _PENDING, pending)


def pending_weights(model: nn.Module) -> PendingWeights | None:
    """Return the weights a model is still to be filled with; None if it has its weights."""
    return next((vars(module)[_PENDING] for module in model.modules() if _PENDING in vars(module)), None)
