"""Write checkpoints while training waits, or beside it from a copy in host memory.

Beside training means: what changes in the next step is copied, which needs the other processes, and training
goes on; a thread of every process then writes, and these threads agree over connections of their own that the
checkpoint is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glmtune.training.adapt import Tuned
from glmtune.training.checkpoints import folder as checkpoints
from glmtune.training.distributed import collectives, fsdp, zero_state

if TYPE_CHECKING:
    from glmtune.training.trainer import GlmTrainer

OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True)
class Parts:
    """The large parts of a checkpoint, as they are now or as they were when it was begun.

    Attributes:
        write_state: writes this process's part of the optimizer's state; may need the other processes.
        weights: when all have written that, trained weights by parameter name; None: the model's own.
    """

    write_state: Callable[[], None]
    weights: Callable[[], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Job:
    """A checkpoint that was begun.

    Attributes:
        opened: ends by sealing the folder in the first process, or by removing it after an error.
        folder: where it is prepared.
        final: its name once it is complete.
        facts: for the manifests of ``last``.
        best: for the manifest of ``best``, if this is the best one so far and to be published with it.
        parts: the large ones; the small ones are in the folder.
        tuned: how the model is written.
        writes: whether this process writes the model and seals.
        keep: newest checkpoints kept; None keeps all.
    """

    opened: ExitStack
    folder: Path
    final: Path
    facts: dict[str, Any]
    best: dict[str, Any] | None
    parts: Parts
    tuned: Tuned
    writes: bool
    keep: int | None


def complete(job: Job, group: Any) -> None:
    """Write what is missing of a checkpoint, seal it, publish it; every process must call this.

    Args:
        job: the checkpoint.
        group: the connections to agree over; None: those of training.

    Raises:
        TrainingError: something could not be written, in the first process; OSError in others.
    """
    with job.opened:
        with collectives.agreed("write its part of the checkpoint", checkpoints.WRITE_ERRORS, group):
            job.parts.write_state()
        with collectives.agreed("write the checkpoint", checkpoints.WRITE_ERRORS, group):
            if job.writes:
                job.tuned.save(job.folder, job.parts.weights())
        sealing = job.opened.pop_all()
    with collectives.all_or_none(group):
        sealing.close()
        if job.writes:
            run = job.final.parent
            checkpoints.publish(job.final, run / "last", facts=job.facts)
            if job.best is not None:
                checkpoints.publish(job.final, run / "best", facts=job.best)
            checkpoints.rotate(run, keep=job.keep)


class Saves:
    """Runs what writes a checkpoint, one at a time."""

    def __init__(self, *, beside: bool, timeout_seconds: float) -> None:
        """Connect the threads of all processes, which must all call this.

        Args:
            beside: write in a thread, beside training.
            timeout_seconds: how long they wait for each other.
        """
        self.beside = beside
        self._group = collectives.second_group(timeout_seconds) if beside else None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def start(self, job: Job) -> None:
        """Complete a checkpoint now, or begin to, beside training.

        Raises:
            TrainingError: see `complete`.
        """
        assert self._thread is None, "one checkpoint at a time"
        if not self.beside:
            complete(job, None)
            return
        self._thread = threading.Thread(target=self._run, args=(job,), name="glmtune-save", daemon=True)
        self._thread.start()

    def _run(self, job: Job) -> None:
        try:
            complete(job, self._group)
        except BaseException as error:  # raised again where training waits for it
            self._problem = error

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint that was begun could not be written, as far as is known now."""
        return self._problem is not None

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is complete.

        Raises:
            TrainingError: it could not be written; OSError in processes other than the first.
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


def parts_of(trainer: GlmTrainer, folder: Path) -> Parts:
    """Gather the large parts of a checkpoint; every process must call this.

    Args:
        trainer: between two steps.
        folder: where they will be written.
    """
    model, beside = trainer.tuned.model, trainer.saves.beside
    writes = trainer.args.should_save
    if trainer.is_deepspeed_enabled:
        state = zero_state.State(
            trainer.model_wrapped, model, rank=trainer.args.process_index, count=trainer.args.world_size
        )
        if beside:
            state.copy()
        return Parts(lambda: state.write(folder), lambda: zero_state.TrainedWeights(folder, model))
    weights: dict[str, Tensor] | None = None
    if trainer.divides:
        weights = fsdp.whole_weights(model, keep=writes)
        values = fsdp.whole_optimizer(trainer.plain_optimizer, keep=writes)
    else:
        values = trainer.plain_optimizer.state_dict() if writes else {}
        if beside and writes:
            weights, values = _trained_weights(model), in_host_memory(values)

    def write_state() -> None:
        if writes:
            torch.save(values, folder / OPTIMIZER_FILE)

    return Parts(write_state, lambda: weights)


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
