"""The callback that measures retention: the base is asked once, the tuned model at every evaluation.

When what happens, in a run that begins:

    on_train_begin    the run folder is open (and weights are sharded, where they are): the base answers, the
                      tuned part off; its answers and distributions are written, their fingerprint becomes a
                      fact of the run
    evaluate          the trainer calls `measure` and logs its figures with the loss; whether they may make a
                      `best` is asked of `may_be_best`
    on_step_end       of the last step, where no evaluation is due there: measured all the same, and logged

What is measured is the model as users will have it. A switch, fitted in `on_train_begin` as well, plays no
part in training; here it decides first, and what it leaves to the base is the base's answer by definition.

A run that goes on reads what the base answered: full tuning has no base left to ask, and a prefix's base
might answer otherwise on another machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import datasets
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.base import GlmTokenizer
from glmtune.retention.base_answers import make_answers
from glmtune.retention.distributions import base_distributions
from glmtune.retention.measure import Base, TunedAnswer, ask, left_to_base, summarize
from glmtune.retention.prompts import Prompt
from glmtune.retention.settings import RetentionSettings
from glmtune.retention.style import TaskStyle
from glmtune.terminal.progress import Meter
from glmtune.training.adapt import TunedModel
from glmtune.training.callbacks import ProgressDisplay
from glmtune.training.checkpoints.folder import read_manifest
from glmtune.training.distributed import collectives, fsdp
from glmtune.training.evaluation import undisturbed
from glmtune.training.log import append_entry
from glmtune.training.measuring.files import forget_later_steps, read_base, write_base, write_step
from glmtune.training.run_folder import check_fingerprints
from glmtune.training.trainer import GlmTrainer

FINGERPRINT = "retention_fingerprint"
"""Of the base's answers, in the manifests of checkpoints."""
TASK_ROWS = 2000
"""Training rows whose answers tell the style of the task; more change its trigrams' shares no more."""


class Exam(Protocol):
    """Questions with keys, asked of the base before the first step; see `evaluation.compare.kept.Exam`."""

    @property
    def has_base(self) -> bool:
        """Whether the base has answered all of them."""
        ...

    def ask_base(self) -> None:
        """Ask the model, which is its own base now; a collective."""
        ...


class RetentionMeasure(TrainerCallback):
    """Measures what is left of the base's answers; see the module.

    Attributes:
        settings: what is asked, and what `best` must keep.
        exam: what the base is asked besides; None: nothing.
        display: of the steps, where one is shown; it says what is being done.
        close_other: closes the display of the evaluation that this is a part of.
    """

    def __init__(
        self,
        trainer: GlmTrainer,
        settings: RetentionSettings,
        tokenizer: GlmTokenizer,
        prompts: Sequence[Prompt],
        task_rows: datasets.Dataset,
        checkpoint: Path | None,
    ) -> None:
        """Have the trainer measure.

        Args:
            trainer: ready; mutated.
            settings: what is asked.
            tokenizer: the model's.
            prompts: general ones; those that do not fit the model's context are left out.
            task_rows: encoded rows to learn; only their answers are read.
            checkpoint: that the run goes on from; None: it begins.
        """
        self.settings = settings
        self.exam: Exam | None = None
        self.display: ProgressDisplay | None = None
        self.close_other: Callable[[], None] = lambda: None
        self._trainer, self._tokenizer = trainer, tokenizer
        self._prompts, self._task_rows, self._checkpoint = prompts, task_rows, checkpoint
        self._base: Base | None = None
        self._off: frozenset[int] | None = None
        self._measured_step = 0
        trainer.also_measured = self.measure
        trainer.may_be_best = self.may_be_best

    # ---- the base

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the base's answers at hand: made where the run begins, read where it goes on."""
        run = self._trainer.run_folder
        if self._base is None:  # training begins once more after a rollback
            if self._is_to_be_made():
                self._ask_base(run)
            with collectives.propagate_errors():
                answers, distributions = read_base(run, self._tokenizer)
                if self._checkpoint is not None:
                    check_fingerprints(self._checkpoint, {FINGERPRINT: answers.fingerprint})
            self._trainer.fingerprints[FINGERPRINT] = answers.fingerprint
            style = TaskStyle(task_answers(self._task_rows, self._tokenizer), answers.texts)
            self._base = Base(answers, distributions, style)
            self._ask_exam()
        if state.is_world_process_zero:
            forget_later_steps(run, state.global_step)
        self._leave_out_of_speeds()

    def _leave_out_of_speeds(self) -> None:
        """Let the log begin the time of a step anew, as after an evaluation."""
        trainer = self._trainer
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {})

    def _is_to_be_made(self) -> bool:
        """Tell whether the base is to be asked now.

        Raises:
            ConfigError: there is none any more.
        """
        if self._checkpoint is None:
            return True
        if FINGERPRINT in (read_manifest(self._checkpoint) or {}):
            return False
        if isinstance(self._trainer.tuned, TunedModel):
            raise ConfigError(
                f"`retention` is measured against the base, but {self._checkpoint} was made without: all "
                "weights are tuned, and what the base answered before is not known. Add `retention=null`."
            )
        return True

    def _ask_exam(self) -> None:
        """Ask the base the exam where it has not answered it.

        Raises:
            ConfigError: there is no base any more.
        """
        if self.exam is None or (self._checkpoint is not None and self.exam.has_base):
            return
        if self._checkpoint is not None and isinstance(self._trainer.tuned, TunedModel):
            raise ConfigError(
                f"`retention.exam` is `{self.settings.exam}`, but the base's answers to it are not in the "
                "run folder (`retention/exam/base`), and all weights are tuned: there is no base to ask. "
                "Restore them, or add `retention.exam=null`."
            )
        with self._trainer.tuned.base_alone(), self.asking():
            self.exam.ask_base()
        collectives.barrier()

    def _ask_base(self, run: Path) -> None:
        trainer, start = self._trainer, time.monotonic()
        model = cast(PreTrainedModel, trainer.tuned.model)
        with trainer.tuned.base_alone():
            with self.asking():
                answers = make_answers(
                    model,
                    self._tokenizer,
                    self._prompts,
                    max_new_tokens=self.settings.max_new_tokens,
                    share=not holds_shards(trainer),
                    progress="the base answers",
                )
            with self.asking():
                distributions = base_distributions(
                    model,
                    list(zip(answers.prompt_ids, answers.answer_ids, strict=True)),
                    pad_token_id=cast(int, self._tokenizer.pad_token_id),
                    batch_size=trainer.args.per_device_eval_batch_size,
                )
        with collectives.propagate_errors():
            if trainer.is_world_process_zero():
                write_base(run, answers, distributions)
                seconds = time.monotonic() - start
                step = trainer.state.global_step
                entry = {"retention_prompts": len(answers.prompts), "eval_retention_runtime": seconds}
                append_entry(run, {"step": step, "epoch": round(trainer.state.epoch or 0.0, 6), **entry})

    # ---- the tuned model

    def measure(self) -> dict[str, float]:
        """Measure the model as it is now. A collective: all processes call it.

        Returns:
            ``eval_retention`` (share of answers that are the base's), ``eval_retention_kl`` (nats per token),
            ``eval_leak_rate`` (share of answers in the style of the task), with a switch
            ``eval_retention_switched_off`` (share of prompts that it left to the base), and
            ``eval_retention_runtime`` (seconds); nothing at step 0, where the model is its base and keeps all
            of it by definition.

        Raises:
            GlmtuneError: the answers cannot be written.
        """
        step = self._trainer.state.global_step
        if step == 0 or self._base is None:
            return {}
        self.close_other()
        start = time.monotonic()
        answers = self._ask_tuned(self._base)
        with collectives.propagate_errors():
            if self._trainer.is_world_process_zero():
                write_step(self._trainer.run_folder, step, self._base.answers, answers)
        self._measured_step = step
        found = summarize(answers)
        return {
            "eval_retention": found.kept_frac,
            "eval_retention_kl": found.kl_nats,
            "eval_leak_rate": found.leak_frac,
            **({"eval_retention_switched_off": found.off_frac} if self._obeys_switch else {}),
            "eval_retention_runtime": time.monotonic() - start,
        }

    def _ask_tuned(self, base: Base) -> list[TunedAnswer]:
        trainer, off = self._trainer, self._switched_off(base)
        asked = [index for index in range(len(base.answers)) if index not in off]
        # Whole weights: each process asks a part. Sharded ones: all must go through the same passes at the
        # same time, so all ask everything, and have the same answers.
        shares = trainer.args.world_size > 1 and not holds_shards(trainer)
        rank, parts = (trainer.args.process_index, trainer.args.world_size) if shares else (0, 1)
        which = asked[rank::parts]
        with collectives.propagate_errors(), self.asking(), self._progress(len(which)) as advance:
            mine = ask(
                cast(PreTrainedModel, trainer.tuned.model),
                self._tokenizer,
                base,
                which,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=trainer.args.per_device_eval_batch_size,
                advance=advance,
            )
        all_parts = collectives.all_gather(mine) if shares else [mine]
        answers = [*left_to_base(base, off), *(answer for part in all_parts for answer in part)]
        return sorted(answers, key=lambda answer: answer.index)

    @property
    def _obeys_switch(self) -> bool:
        """Whether the model has a switch, which users' prompts meet as well."""
        switching = self._trainer.switching
        return switching is not None and switching.outcome is not None and switching.outcome.is_saved

    def _switched_off(self, base: Base) -> frozenset[int]:
        """Return which prompts the switch leaves to the base: decided once, as training changes neither."""
        if not self._obeys_switch:
            return frozenset()
        if self._off is None:
            switching = self._trainer.switching
            assert switching is not None
            with self.asking():
                self._off = frozenset(switching.off_prompts(self._trainer, base.answers.prompt_ids))
        return self._off

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure after the last step, before its checkpoint is written, if no evaluation is due there."""
        if state.global_step < state.max_steps or control.should_evaluate:
            return
        if state.global_step != self._measured_step:
            is_logged = control.should_log
            self._trainer.log(self.measure())
            control.should_log = is_logged  # transformers takes one line of the log for the step's own
            self._leave_out_of_speeds()

    def may_be_best(self, metrics: Mapping[str, float]) -> bool:
        """Tell whether an evaluation keeps enough of the base's answers to be the best one."""
        target = self.settings.target
        return target is None or metrics["eval_retention"] >= target

    # ---- how a model is asked

    @contextmanager
    def asking(self) -> Generator[None]:
        """Run a block that asks the model, whatever shards it; afterwards it trains on as before."""
        trainer = self._trainer
        with ExitStack() as stack:
            stack.enter_context(trainer.accelerator.autocast())
            stack.enter_context(undisturbed(trainer.tuned.model, trainer.args.device))
            # Answers grow by a token a pass, and each new shape would be compiled anew.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if trainer.uses_fsdp2:
                stack.enter_context(fsdp.callable_in_parts(trainer.tuned.model))
            yield

    @contextmanager
    def _progress(self, count: int) -> Generator[Callable[[int], None]]:
        """Show how many answers are settled, where that takes long."""
        if not self._trainer.is_world_process_zero():
            yield lambda done: None
        elif (display := self.display) is not None and display.is_open:
            try:
                yield lambda done: display.doing(f"asked {done}/{count}")
            finally:
                display.doing("")
        else:
            with Meter("asking the tuned model", total=count, unit="answers", transient=True) as meter:
                yield meter.update


def holds_shards(trainer: GlmTrainer) -> bool:
    """Tell whether each process holds only a part of the weights: FSDP2, or ZeRO's stage 3."""
    return trainer.uses_fsdp2 or any(
        hasattr(weight, "ds_numel") for weight in trainer.tuned.model.parameters()
    )


def task_answers(rows: datasets.Dataset, tokenizer: GlmTokenizer) -> list[str]:
    """Return answers that a run learns, as texts: of rows at equal distances, `TASK_ROWS` at most.

    Args:
        rows: with ``labels``, -100 where nothing is learnt; a row may hold several answers.
        tokenizer: that encoded them.
    """
    count = min(len(rows), TASK_ROWS)
    chosen = rows.select([place * len(rows) // count for place in range(count)]) if count else []
    template = template_for(tokenizer)
    texts: list[str] = []
    for row in chosen:
        answer: list[int] = []
        for label in [*cast(Mapping[str, Any], row)["labels"], IGNORE_INDEX]:
            if label != IGNORE_INDEX:
                answer.append(label)
            elif answer:
                text = str(tokenizer.decode(answer, skip_special_tokens=True))
                # Of an answer whose thoughts are not learnt there is no tag that ends them.
                texts.append(template.clean_answer(text) or text.strip())
                answer = []
    return texts
