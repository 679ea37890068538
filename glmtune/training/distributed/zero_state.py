"""Optimizer states and float32 weights under ZeRO: written by all processes, read by any number of them.

ZeRO lays the trained parameters of a group end to end and cuts this flat row where it likes, so a process
holds pieces that mean nothing to another number of processes. Checkpoints hold whole parameters instead:

    parameters        |--- a ---|------- b -------|- c -|--- d ---|
    ZeRO, 2 processes |    process 0     |      process 1         |     pieces, as trained
    ZeRO, 3 processes | process 0 | process 1  |    process 2     |

    files               zero-00001-of-00002: a, c, d   zero-00002-of-00002: b   zero.json: names, step, scale

For each parameter in turn all processes gather it (weight, exp_avg, exp_avg_sq), and the one that owns it
writes it to a file of its own. So the files do not depend on how many processes there were, on the ZeRO stage
or on offloading; a process never holds more than one parameter beyond its own part; all write at once; and
nothing in the files can run code, as pickled states could. (DeepSpeed's own universal checkpoints have the
same idea, but are made by a script after the run.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glmtune.errors import CheckpointError
from glmtune.training.distributed import deepspeed_engine

FILE_PATTERN = "zero-{number:05d}-of-{count:05d}.safetensors"
INDEX_FILE = "zero.json"
WEIGHT = "weight"
Shape = tuple[int, ...]


class StateShare:
    """This process's share of weights and optimizer states: whole parameters, gathered when asked for."""

    def __init__(self, engine: Any, model: nn.Module, *, rank: int, count: int) -> None:
        """Choose the owner of every parameter; every process must do this, and comes to the same choice.

        Args:
            engine: DeepSpeed's, after a step at least.
            model: its module.
            rank: of this process.
            count: processes in all.
        """
        self._engine, self._model, self._rank, self._count = engine, model, rank, count
        self._parts = [WEIGHT, *deepspeed_engine.state_names(engine)]
        named = list(deepspeed_engine.trained(model))
        self._owners = _owners([(name, deepspeed_engine.full_shape(weight)) for name, weight in named], count)
        self._shapes = {
            f"{part}:{name}": deepspeed_engine.full_shape(weight)
            for name, weight in named
            for part in self._parts
            if self._owners[name] == rank
        }
        self._scalars = deepspeed_engine.scalars(engine)
        self._copies: list[Tensor] | None = None

    def copy(self) -> None:
        """Keep the share as it is now, float32 in host memory; every process must call this."""
        self._copies = [whole.to("cpu", torch.float32, copy=True) for whole in self._own()]

    def _own(self) -> Iterator[Tensor]:
        """Gather one parameter after the other, with all processes, and yield those of this one."""
        for name, parameter in deepspeed_engine.trained(self._model):
            for part in self._parts:
                whole = deepspeed_engine.get_full(parameter, None if part == WEIGHT else part).detach()
                if self._owners[name] == self._rank:
                    yield whole
                del whole  # before the next one is gathered, or two would be held

    def write(self, folder: Path) -> None:
        """Write the share; every process must call this, unless it was copied before.

        Args:
            folder: exists, seen by all processes.

        Raises:
            OSError: this process could not write; it took part in gathering parameters all the same, so that
                the others did not wait for it.
        """
        # A failure is remembered, not raised, until the loop is through: it holds the collectives.
        path = folder / FILE_PATTERN.format(number=self._rank + 1, count=self._count)
        file, problem = _open(path, self._shapes)
        for whole in self._copies if self._copies is not None else self._own():
            if file is not None and problem is None:
                problem = _write(file, whole)
        if file is not None:
            try:
                file.close()
            except OSError as error:
                problem = problem or error
        if problem is not None:
            raise problem
        if self._rank == 0:
            index = {"files": self._count, "parts": self._parts, "scalars": self._scalars}
            (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def _owners(shapes: list[tuple[str, Shape]], count: int) -> dict[str, int]:
    """Give every parameter to the process that has the least to write so far."""
    load = [0] * count
    owners: dict[str, int] = {}
    for name, shape in shapes:
        owners[name] = load.index(min(load))
        load[owners[name]] += math.prod(shape)
    return owners


# Written by hand, as neither safetensors nor `write_shards` of `models.checkpoints` can: both want the
# tensors of a file at once or on demand, while here they pass by one at a time, in an order that all
# processes share, and a process that fails to write has to go on gathering. The format is a length, a JSON
# header with the place of every tensor (known from the shapes beforehand), and the numbers end to end.
def _open(path: Path, shapes: Mapping[str, Shape]) -> tuple[BinaryIO | None, OSError | None]:
    """Begin a safetensors file of float32 tensors, which will follow in the order given."""
    header: dict[str, Any] = {}
    offset = 0
    for key, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8, as readers map them
    try:
        file = path.open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
    except OSError as error:
        return None, error
    return file, None


def _write(file: BinaryIO, full: Tensor) -> OSError | None:
    try:
        file.write(full.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    except OSError as error:
        return error
    return None


def refuse_other_optimizer_state(folder: Path, *, is_zero: bool) -> None:
    """Make sure that a run goes on with DeepSpeed if, and only if, it began with it.

    Raises:
        CheckpointError: the optimizer's state in the checkpoint is of the other format.
    """
    if (folder / INDEX_FILE).is_file() and not is_zero:
        raise CheckpointError(
            f"{folder} holds the optimizer's state of a DeepSpeed run, but `deepspeed` is null. To go on, "
            "add `deepspeed=zero2` (one process can: `launch.num_processes=1`); to train anew from its "
            "weights, name it as `model.source` with another `output_dir`."
        )
    if (folder / "optimizer.pt").is_file() and is_zero:
        raise CheckpointError(
            f"{folder} holds the optimizer's state of a run without DeepSpeed. To go on, add "
            "`deepspeed=null`; to train anew from its weights, name it as `model.source` with another "
            "`output_dir`."
        )


def load_state(engine: Any, model: nn.Module, folder: Path) -> None:
    """Load weights and optimizer states of a checkpoint into a fresh engine; every process must call this.

    Args:
        engine: DeepSpeed's, before its first step.
        model: its module.
        folder: a complete checkpoint, made with any number of processes and any ZeRO stage.

    Raises:
        CheckpointError: the files are damaged, or hold other parameters than the model trains.
    """
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        state = StateFiles(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no state of a DeepSpeed run ({error}). Go on with the settings it was made "
            "with, or start anew with `resume=never`."
        ) from error
    parts = [part for part in index["parts"] if part != WEIGHT]
    wanted = {f"{part}:{name}" for name, _ in deepspeed_engine.trained(model) for part in index["parts"]}
    if wanted != set(state.keys()):
        odd = sorted(wanted ^ set(state.keys()))
        raise CheckpointError(
            f"{folder} holds other parameters than this run trains: {len(odd)} differ, such as {odd[0]}. "
            "Go on with the settings it was made with, or start anew with `resume=never`."
        )
    # A fresh optimizer has no states to put values in: it makes them in its first step.
    deepspeed_engine.allocate_states(engine, parts, index["scalars"])
    for name, parameter in deepspeed_engine.trained(model):
        for part in index["parts"]:
            full = state[f"{part}:{name}"].to(parameter.device)
            deepspeed_engine.set_full(parameter, None if part == WEIGHT else part, full)


class StateFiles(Mapping[str, Tensor]):
    """The tensors of a checkpoint's state files, read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Open the files of a folder.

        Args:
            folder: a checkpoint.
        """
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        count = int(index["files"])
        files = [
            safe_open(folder / FILE_PATTERN.format(number=number, count=count), "pt")
            for number in range(1, count + 1)
        ]
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor by ``PART:PARAMETER``."""
        return self._file_of[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._file_of)


class TrainedWeights(Mapping[str, Tensor]):
    """Float32 weights of a checkpoint by parameter name; tied parameters have several."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        """Find the names.

        Args:
            folder: holds the state files.
            model: the module that was trained.
        """
        self._state = StateFiles(folder)
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        self._stored = {
            name: f"{WEIGHT}:{first[id(parameter)]}"
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if f"{WEIGHT}:{first[id(parameter)]}" in self._state
        }

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight."""
        return self._state[self._stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._stored)
