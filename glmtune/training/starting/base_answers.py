"""What is replayed: the base's answers, made when training begins, and read when it goes on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.retention.base_answers import BaseAnswers, make_answers, read_answers, write_answers
from glmtune.retention.own_prompts import sample_prompts
from glmtune.retention.prompts import Prompt, load_prompts
from glmtune.retention.settings import RETAIN_FILE, SELF
from glmtune.training.distributed import collectives, fsdp
from glmtune.training.run_folder import check_fingerprints
from glmtune.training.trainer import GlmTrainer

FINGERPRINT = "retain_fingerprint"
"""Fact of a run that replays: which answers."""


def load_retain_prompts(where: str) -> list[Prompt] | None:
    """Read the prompts of a replay before anything is loaded for them; None where the base thinks them up.

    Args:
        where: ``retain.prompts``.

    Raises:
        DataError: see `load_prompts`.
    """
    return None if where == SELF else load_prompts(where, shipped="retain")


class ReplayStart(TrainerCallback):
    """Gives the trainer's replay its answers; has to be called after the run folder is opened."""

    def __init__(self, trainer: GlmTrainer, checkpoint: Path | None) -> None:
        """Read the answers that a run goes on with.

        Args:
            trainer: it replays.
            checkpoint: from which the run goes on; None: it begins.

        Raises:
            CheckpointError: the answers are not there, or are damaged.
            ConfigError: they are not those of the checkpoint.
        """
        assert trainer.replay is not None
        self._trainer, self._replay = trainer, trainer.replay
        self._prompts: list[Prompt] | None = None
        if checkpoint is None:
            with collectives.propagate_errors():
                self._prompts = load_retain_prompts(self._replay.settings.prompts)
        else:
            # Beside the checkpoint, which may be one of another run folder.
            file = checkpoint.parent / RETAIN_FILE
            answers = collectives.broadcast_from_main(lambda: read_answers(file, self._tokenizer))
            check_fingerprints(checkpoint, {FINGERPRINT: answers.fingerprint})
            self._take(answers)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the answers, if this is the first step, and keep them in the run folder."""
        if self._replay.answers is None:
            with self._trainer.tuned.base_alone(), whole_layers_outside(self._trainer):
                self._take(self._made())
        answers, file = self._replay.answers, self._trainer.run_folder / RETAIN_FILE
        assert answers is not None
        begins = state.global_step == 0

        def keep() -> None:
            # Asked by one process for all: another might look when the file has just been written, or on a
            # machine that has none, and leave the others alone in the collective.
            if begins or not file.exists():
                write_answers(file, answers)

        collectives.broadcast_from_main(keep)

    def _made(self) -> BaseAnswers:
        model = cast(PreTrainedModel, self._trainer.tuned.model)
        share = not self._trainer.is_sharded
        with self._trainer.accelerator.autocast():
            prompts = self._prompts
            if prompts is None:
                prompts = sample_prompts(
                    model,
                    self._tokenizer,
                    seed=self._trainer.args.seed,
                    share=share,
                    progress="the base thinks up prompts",
                )
            return make_answers(
                model,
                self._tokenizer,
                prompts,
                max_new_tokens=self._replay.settings.max_new_tokens,
                share=share,
                progress="the base answers",
            )

    def _take(self, answers: BaseAnswers) -> None:
        self._replay.answers = answers
        self._trainer.fingerprints[FINGERPRINT] = answers.fingerprint

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._replay.tokenizer


@contextmanager
def whole_layers_outside(trainer: GlmTrainer) -> Generator[None]:
    """Let a block call parts of a model by themselves, whoever shards it; a collective.

    The engine calls decoder stack and head, not the model as a whole. ZeRO gathers the weights of whatever
    module is called; FSDP2 has those outside the layers (embedding, head, prefix) in one group, which only
    a call of the whole model gathers.

    Args:
        trainer: in training.
    """
    model = trainer.tuned.model
    if not trainer.uses_fsdp2:
        yield
        return
    # FSDP2 sets itself up in the first call of the whole model; the layers alone would take themselves for
    # models of their own. On a GPU the call also makes its streams wait for the last update.
    pad = torch.zeros((1, 1), dtype=torch.long, device=trainer.args.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(input_ids=pad, attention_mask=torch.ones_like(pad))
    model.train(was_training)
    with fsdp.outer_weights_gathered(model):
        yield
