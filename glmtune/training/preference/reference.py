"""The reference of a run that measures against its own beginning: log-probabilities, made once and kept.

Full tuning has no base left once it has begun, and a prefix or adapter that is tuned further may be measured
against what it was. So every answer is read once before the first step; two numbers per example are kept in
``RUN/preference/reference.safetensors``, their fingerprint is a fact of the run, and a run that goes on reads
them and must find what it began with.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.errors import CheckpointError
from glmtune.preference.settings import START
from glmtune.storage.files import write_atomically, write_error
from glmtune.terminal.text import write_error as say
from glmtune.training.distributed import collectives
from glmtune.training.preference.trainer import PreferenceTrainer
from glmtune.training.run_folder import check_fingerprints
from glmtune.training.trainer import GlmTrainer

REFERENCE_FILE = "preference/reference.safetensors"
"""In a run folder."""
FINGERPRINT = "preference_fingerprint"
"""Fact of a run that is measured against its beginning."""


def reference_start(trainer: GlmTrainer, checkpoint: Path | None) -> ReferenceStart | None:
    """Return what gives a run its kept reference; None where it needs none.

    Args:
        trainer: ready.
        checkpoint: from which the run goes on; None: it begins.

    Raises:
        CheckpointError: see `ReferenceStart`.
    """
    if isinstance(trainer, PreferenceTrainer) and trainer.reference == START:
        return ReferenceStart(trainer, checkpoint)
    return None


class ReferenceStart(TrainerCallback):
    """Gives the trainer the log-probabilities that answers are measured against."""

    def __init__(self, trainer: PreferenceTrainer, checkpoint: Path | None) -> None:
        """Read what a run goes on with, or make it where nobody shards the weights.

        Args:
            trainer: what it tunes is as the run begins.
            checkpoint: from which the run goes on; None: it begins.

        Raises:
            CheckpointError: what was kept is not there, is damaged, or is of other rows.
            ConfigError: it is not that of the checkpoint.
        """
        self._trainer = trainer
        self._kept: dict[str, np.ndarray] | None = None
        if checkpoint is not None:
            # Beside the checkpoint, which may be one of another run folder.
            file = checkpoint.parent / REFERENCE_FILE
            kept = collectives.broadcast_from_main(lambda: _read(file, trainer))
            check_fingerprints(checkpoint, {FINGERPRINT: _fingerprint(kept)})
            self._take(kept)
        elif not trainer.is_sharded:  # before the first evaluation; shards are whole only in training
            self._take(self._made())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Make it where weights are sharded, and keep it in the run folder, which is open now."""
        if self._kept is None:
            self._take(self._made())
        kept, file = self._kept, self._trainer.run_folder / REFERENCE_FILE
        assert kept is not None
        rows = {split: each.fingerprint for split, each in self._trainer.sets().items()}
        begins = state.global_step == 0

        def keep() -> None:
            # Asked by one process for all: another might look when the file has just been written, or on a
            # machine that has none, and leave the others alone in the collective.
            if begins or not file.exists():
                _write(file, kept, rows)

        collectives.broadcast_from_main(keep)

    def _made(self) -> dict[str, np.ndarray]:
        if collectives.is_main_process():
            count = sum(map(len, self._trainer.sets().values()))
            say(f"glmtune: the reference reads {count:,} examples once, before the first step\n")
        with self._trainer.accelerator.autocast():
            return {
                split: self._trainer.measured(split, compares=False)[:, :2].float().numpy()
                for split in self._trainer.sets()
            }

    def _take(self, kept: dict[str, np.ndarray]) -> None:
        self._kept = kept
        for split, rows in self._trainer.sets().items():
            rows.reference = kept[split]
        self._trainer.fingerprints[FINGERPRINT] = _fingerprint(kept)


def _fingerprint(kept: dict[str, np.ndarray]) -> str:
    # Of what is learnt alone: rows to evaluate on may be others when a run goes on.
    return sha256(np.ascontiguousarray(kept["train"]).tobytes()).hexdigest()


def _write(file: Path, kept: dict[str, np.ndarray], rows: dict[str, str]) -> None:
    content = save({split: np.ascontiguousarray(values) for split, values in kept.items()}, metadata=rows)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise write_error(file, error) from error


def _read(file: Path, trainer: PreferenceTrainer) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="numpy") as held:
            made_of = held.metadata() or {}
            kept = {split: held.get_tensor(split) for split in held.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}. It holds what answers are measured against, which is made once,"
            " before the first step. Restore it, or start anew with `resume=never`."
        ) from None
    for split, rows in trainer.sets().items():
        found = kept.get(split)
        is_whole = found is not None and found.shape == (len(rows), 2) and found.dtype == np.float32
        if not is_whole or made_of.get(split) != rows.fingerprint:
            raise CheckpointError(
                f"{file} holds no reference of these {len(rows)} {split} examples: they, or the lengths that"
                " cut them, are others than when the run began, and the model of then is gone. Go on with"
                " those; or begin a new run with what was tuned (`prefix_path=`, `adapter_path=`,"
                " `init_from=`) and another `output_dir`."
            )
    return kept
