"""Does a checkpoint fit what is to be trained, and is there anything left to train?"""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_callback import TrainerState

from glmtune.errors import ConfigError
from glmtune.training.adapt import TunedAdapter, TunedPrefix
from glmtune.training.checkpoints.folder import read_manifest, step_of
from glmtune.training.distributed.zero_state import refuse_other_optimizer_state
from glmtune.training.trainer import GlmTrainer


def refuse_unfit(trainer: GlmTrainer, checkpoint: Path) -> None:
    """Refuse a checkpoint that training cannot go on from, before anything is changed.

    Args:
        trainer: ready.
        checkpoint: a complete one.

    Raises:
        CheckpointError: it holds something else than is tuned now, or another kind of optimizer state.
        ConfigError: it is past the last step that the settings ask for.
    """
    trainer.tuned.check(checkpoint)
    refuse_other_optimizer_state(checkpoint, is_zero=trainer.is_deepspeed_enabled)
    step, planned = step_of(checkpoint) or 0, trainer.planned_steps()
    if step > planned:
        name = "num_train_epochs" if trainer.settings.max_steps is None else "max_steps"
        raise ConfigError(
            f"`trainer.{name}` is {getattr(trainer.settings, name)}, so the run has {planned} steps, but "
            f"{checkpoint} is already at step {step}. Raise `trainer.{name}`; or, to end there, move the "
            "later checkpoints away and go on from an earlier one with `resume=force`."
        )


def has_ended(trainer: GlmTrainer, checkpoint: Path) -> bool:
    """Tell whether a checkpoint is its run's last; if so, the trainer takes over its weights and state.

    Args:
        trainer: ready; mutated.
        checkpoint: a complete one. A run whose number of steps was raised since has not ended.
    """
    manifest, planned = read_manifest(checkpoint) or {}, trainer.planned_steps()
    stopped_early = manifest.get("ended") and manifest.get("max_steps") == planned
    if not stopped_early and step_of(checkpoint) != planned:
        return False
    trainer.tuned.load(checkpoint)
    if isinstance(trainer.tuned, TunedPrefix | TunedAdapter):  # what asks the tuned model obeys it
        trainer.tuned.switch = trainer.tuned.saved_switch(checkpoint)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return True
