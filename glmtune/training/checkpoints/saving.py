"""Write checkpoints while training waits, or asynchronously from a copy in host memory.

How a checkpoint passes from the training thread to the writer thread (`trainer.async_save=true`), in every
process:

    training   step | small files, copy parts | step | step | step | finish | small files, copy parts | ...
    writer                                 '--> optimizer | weights | seal: sync, rename | publish |

The copy needs the other processes (ZeRO and FSDP gather), so it belongs to the training thread; what follows
is writing alone. Writers agree over a process group of their own that all parts are there. There is one
checkpoint at a time: the next one waits in `finish` for the one before. Without `async_save` the same steps
run in the training thread, over the tensors themselves.

What is rolled back, and when:

    until all parts are written   an error in any process is raised in all, and the hidden folder is removed
    while it is sealed            the same; a checkpoint of that name is put back
    after that                    nothing: the checkpoint is complete, only `last` or `best` may be older
    a kill, at any time           nothing now; the next start removes the hidden folder (`folder.repair`)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.errors import CheckpointError
from glmtune.training.adapt import Tuned
from glmtune.training.checkpoints import folder as checkpoints
from glmtune.training.distributed import collectives, fsdp, zero_state

OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True)
class Parts:
    """The large parts of a checkpoint, as they are now or as they were when it was begun.

    Attributes:
        write_optimizer: given the folder, writes this process's part of the optimizer's state; may need the
            other processes.
        weights: given the folder, when all have written that: trained weights by parameter name; None: the
            model's own.
    """

    write_optimizer: Callable[[Path], None]
    weights: Callable[[Path], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Job:
    """A checkpoint that was begun: the small files are in its folder, the large parts are at hand.

    Attributes:
        staged: the folder, and its manifest, which ``last`` will have as well.
        parts: the large ones.
        tuned: how the model is written.
        best: manifest of ``best``, if this is the best one so far; None: ``best`` stays.
        keep: newest checkpoints kept; None keeps all.
    """

    staged: checkpoints.StagedCheckpoint
    parts: Parts
    tuned: Tuned
    best: Mapping[str, Any] | None
    keep: int | None


def complete(job: Job, group: Any) -> None:
    """Write what is missing of a checkpoint, seal it, publish it; every process must call this.

    Args:
        job: the checkpoint.
        group: the process group to agree over; None: that of training.

    Raises:
        TrainingError: something could not be written, in the main process; OSError in others.
    """
    staged = job.staged
    with staged.discarded_on_error():
        # The optimizer first: under ZeRO its files hold the weights as well, and `weights` reads them there.
        with collectives.propagate_write_errors(
            "write its part of the checkpoint", checkpoints.WRITE_ERRORS, group
        ):
            job.parts.write_optimizer(staged.folder)
        # Weights that are not finite are found here, where one process has them all.
        failures = (*checkpoints.WRITE_ERRORS, CheckpointError)
        with collectives.propagate_write_errors("write the checkpoint", failures, group):
            if staged.is_owner:
                job.tuned.save(staged.folder, job.parts.weights(staged.folder))
    # Everything of every process is in the folder now; what is left is the owner's, and fails in all or none.
    with collectives.propagate_errors(group):
        staged.seal()
        if staged.is_owner:
            run = staged.final.parent
            checkpoints.publish(staged.final, run / "last", manifest=staged.manifest)
            if job.best is not None:
                checkpoints.publish(staged.final, run / "best", manifest=job.best)
            checkpoints.remove_oldest(run, keep=job.keep)  # old ones go last, when the new one is offered


class Saves:
    """Runs what writes a checkpoint, one at a time."""

    def __init__(self, *, asynchronous: bool, timeout_seconds: float) -> None:
        """Connect the writer threads of all processes, which must all call this.

        Args:
            asynchronous: write in a thread while training goes on.
            timeout_seconds: how long the writers wait for each other.
        """
        self.asynchronous = asynchronous
        self._group = collectives.new_gloo_group(timeout_seconds) if asynchronous else None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def start(self, job: Job) -> None:
        """Complete a checkpoint now, or begin to, while training goes on.

        Raises:
            TrainingError: see `complete`.
        """
        assert self._thread is None, "one checkpoint at a time"
        if not self.asynchronous:
            complete(job, None)
            return
        # A daemon, so that an interpreter that ends does not wait for a writer whose partners are gone.
        self._thread = threading.Thread(target=self._run, args=(job,), name="glmtune-save", daemon=True)
        self._thread.start()

    def _run(self, job: Job) -> None:
        try:
            complete(job, self._group)
        except BaseException as error:  # an error of a thread would be printed and lost; `finish` raises it
            self._problem = error

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint that was begun could not be written, as far as is known now."""
        return self._problem is not None

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is complete.

        Raises:
            TrainingError: it could not be written; OSError in processes other than the main one.
        """
        self.wait()
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def wait(self) -> None:
        """Wait until nothing is being written, complete or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def zero_parts(engine: Any, model: nn.Module, *, rank: int, count: int, copies: bool) -> Parts:
    """Return what ZeRO has sharded: each process writes some parameters; every process must call this.

    Args:
        engine: DeepSpeed's, between two steps.
        model: its module.
        rank: of this process.
        count: processes in all.
        copies: take a copy now, so that the next step may change the originals.
    """
    share = zero_state.StateShare(engine, model, rank=rank, count=count)
    if copies:
        share.copy()
    return Parts(share.write, lambda folder: zero_state.TrainedWeights(folder, model))


def fsdp_parts(model: nn.Module, optimizer: torch.optim.Optimizer, *, writes: bool) -> Parts:
    """Return what FSDP2 has sharded, gathered in one process; every process must call this.

    Gathering copies to host memory, so this is the copy that writing asynchronously needs, too.

    Args:
        model: between two steps.
        optimizer: of its weights.
        writes: whether this process writes.
    """
    weights = fsdp.gather_weights(model, keep=writes)
    return _one_writer(fsdp.gather_optimizer(optimizer, keep=writes), weights, writes=writes)


def whole_parts(model: nn.Module, optimizer: torch.optim.Optimizer, *, writes: bool, copies: bool) -> Parts:
    """Return the parts where each process holds all of them, so that one can write alone.

    Args:
        model: between two steps.
        optimizer: of its weights.
        writes: whether this process writes.
        copies: take a copy now, so that the next step may change the originals.
    """
    state = optimizer.state_dict() if writes else {}
    if not (copies and writes):
        return _one_writer(state, None, writes=writes)
    return _one_writer(in_host_memory(state), _trained_weights(model), writes=writes)


def _one_writer(state: dict[str, Any], weights: dict[str, Tensor] | None, *, writes: bool) -> Parts:
    def write_optimizer(folder: Path) -> None:
        if writes:
            torch.save(state, folder / OPTIMIZER_FILE)

    return Parts(write_optimizer, lambda folder: weights)


def in_host_memory(value: Any) -> Any:
    """Copy the tensors in a nest of dictionaries, lists and tuples; everything else stays what it is."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: in_host_memory(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(in_host_memory(item) for item in value)
    return value


def _trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trained weights by name; tied ones are copied once."""
    copies = {id(w): in_host_memory(w) for w in model.parameters() if w.requires_grad}
    named = model.named_parameters(remove_duplicate=False)
    return {name: copies[id(weight)] for name, weight in named if weight.requires_grad}
