"""When a run's switch is fitted: as training begins, once the weights are where they will be."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.terminal.console import Console
from glmtune.training.checkpoints.folder import read_manifest
from glmtune.training.distributed import collectives
from glmtune.training.starting.switch_fitting import MANIFEST_KEY
from glmtune.training.trainer import GlmTrainer


class SwitchStart(TrainerCallback):
    """Gives what is tuned its switch; has to be called after the base alone was evaluated."""

    def __init__(self, trainer: GlmTrainer, checkpoint: Path | None) -> None:
        """Collect the prompts, so that what is wrong with them is known before the run begins.

        Args:
            trainer: it has a ``switching``.
            checkpoint: from which the run goes on; None: it begins.

        Raises:
            ConfigError: there are too few prompts; see also `load_prompts`.
        """
        assert trainer.switching is not None
        self._trainer, self._switching, self._checkpoint = trainer, trainer.switching, checkpoint
        with collectives.propagate_errors():
            self._switching.prepare()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Fit it, or take that of the checkpoint; nothing is done again after a rollback."""
        trainer, switching = self._trainer, self._switching
        if switching.outcome is not None:
            return
        stored, saved = None, None
        if self._checkpoint is not None:
            stored = (read_manifest(self._checkpoint) or {}).get(MANIFEST_KEY)
            saved = trainer.tuned.saved_switch(self._checkpoint)
        assert trainer.model_wrapped is not None
        with trainer.accelerator.autocast():
            switching.begin(
                trainer.tuned, trainer.model_wrapped, stored, saved, is_sharded=trainer.is_sharded
            )
        assert switching.outcome is not None
        trainer.origin[MANIFEST_KEY] = switching.outcome.values()
        # The log begins the time of a step anew, as after an evaluation: this was none.
        trainer.callback_handler.on_evaluate(args, state, control, {})
        if trainer.is_world_process_zero():
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                switching.outcome.line(), markup=False
            )
