"""`transformers.Trainer` plus exact resuming, atomic checkpoints and token-weighted evaluation.

What is overridden is transformers' own inner flow, of version 5.24; a newer one may call these methods
elsewhere. Each has a comment: when it is called there, and why we change it. The order there, in one run:

    train                      _load_from_checkpoint
      _inner_training_loop     get_train_dataloader, _init_training_state, _prepare_for_training
        _prepare_for_training  (our sharding), optimizer, engine or DDP, _load_optimizer_and_scheduler
        on_train_begin         (our running loss)
        _run_epoch             get_batch_samples; for each micro-batch training_step > compute_loss,
                               floating_point_ops, _track_num_input_tokens; then _get_grad_norm,
                               optimizer.step, on_step_end, _maybe_log_save_evaluate
          _maybe_log_save_evaluate    log, evaluate, _determine_best_metric, _save_checkpoint
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from glmtune.data.rows import TrainingRows
from glmtune.models.placeholders import pending_weights
from glmtune.quantization.kernels.for_training import prepare_for_training
from glmtune.retention.replay import Replay
from glmtune.training import evaluation as by_token
from glmtune.training.adapt import Tuned
from glmtune.training.callbacks import Flow
from glmtune.training.checkpoints import folder as checkpoints
from glmtune.training.checkpoints import saving
from glmtune.training.distributed import collectives, deepspeed_engine, fsdp
from glmtune.training.distributed.sharded_loading import load_sharded_for_zero
from glmtune.training.distributed.zero_state import load_state
from glmtune.training.rank_batches import rank_loader
from glmtune.training.row_order import EpochSampler, LengthOrder
from glmtune.training.settings import TrainerSettings
from glmtune.training.starting.optimizer_state import load_optimizer, load_schedule
from glmtune.training.starting.switch_fitting import SwitchFitting
from glmtune.training.watching.callback import TrainingWatch
from glmtune.training.watching.evidence import NotFiniteError, gather_evidence
from glmtune.training.watching.rollback_log import rate_factor


class GlmTrainer(Trainer):
    """Trains the tuned part of a model; a killed run that goes on gives the very same numbers."""

    def __init__(
        self,
        tuned: Tuned,
        args: TrainingArguments,
        settings: TrainerSettings,
        rows: TrainingRows,
        *,
        uses_fsdp2: bool = False,
        fingerprints: Mapping[str, str] | None = None,
        origin: Mapping[str, Any] | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Wire everything together.

        Args:
            tuned: the model and how its tuned part is saved.
            args: made of the settings, see ``glmtune.training.arguments``; ``output_dir`` is the run folder.
            settings: order of rows, what is kept, when to stop and what is watched are read.
            rows: to learn and to be evaluated on.
            uses_fsdp2: shard the weights over the processes by FSDP2.
            fingerprints: of base and data, by name; kept in each checkpoint's manifest, checked on resuming.
            origin: what else the manifests say: with what the run began, and what shaped its prompts.
            replay: of general rows beside the task's; None: none.
        """
        self.tuned = tuned
        self.settings = settings
        self.rows = rows
        self.run_folder = Path(str(args.output_dir))
        self.uses_fsdp2 = uses_fsdp2
        self.fingerprints = dict(fingerprints or {})
        self.replay = replay
        self.switching: SwitchFitting | None = None
        self.origin = dict(origin or {})
        self.also_measured: Callable[[], dict[str, float]] = dict  # at every evaluation
        self.may_be_best: Callable[[dict[str, float]], bool] = lambda metrics: True
        self._train_sampler = EpochSampler(
            rows.train.lengths,
            batch_size=args.per_device_train_batch_size * args.world_size,
            group_by_length=bool(settings.group_by_length),  # decided by `RunConfig`
            seed=args.seed,
            shuffle=settings.shuffle and rows.train.stream is None,  # a stream draws its rows itself
            parts=rows.train.parts,
        )
        self.watch = TrainingWatch(settings, self.run_folder)
        self.saves = saving.Saves(asynchronous=settings.async_save, timeout_seconds=args.ddp_timeout)
        self._improved = self._stopped_early = False
        self._resumed_loss: dict[str, Any] | None = None
        super().__init__(
            model=tuned.model,
            args=args,
            data_collator=cast(Any, rows.collator),
            train_dataset=rows.train.rows,
            eval_dataset=None if rows.validation is None else rows.validation.rows,
            callbacks=[Flow(begin=self._begin, set_epoch=self._train_sampler.set_epoch), self.watch],
        )
        self.remove_callback(PrinterCallback)  # it prints every log entry; ours shows them

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole state: ZeRO or FSDP2 has split it."""
        return self.is_deepspeed_enabled or self.uses_fsdp2

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, without what accelerate puts around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # ---- order of rows

    # Called by get_train_dataloader, at the beginning of training. Replaces a random sampler whose order
    # depends on the global generator, and so on everything drawn before.
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._train_sampler

    # Called at the beginning of training. With several processes accelerate would wrap the loader, and repeat
    # rows until all processes have as many; ours gives every row once.
    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's micro-batches of an epoch."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        batch_size = self.args.per_device_train_batch_size
        return self._rank_loader(self.train_dataset, self._train_sampler, batch_size)

    def _rank_loader(self, rows: Any, order: Sampler[int], batch_size: int) -> DataLoader[Any]:
        return rank_loader(rows, order, self.data_collator, batch_size=batch_size, args=self.args)

    # ---- loss

    # Called by training_step. Our models form logits only at labelled positions if asked to, which spares the
    # largest tensor of a step; asked for here, so that no other caller of the model gets fewer logits.
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Let the model form logits only where there is something to learn; add what is replayed."""
        task = functools.partial(self.task_loss, model, inputs, *args, **kwargs)
        if self.replay is None:
            return task()
        general = functools.partial(GlmTrainer.task_loss, self, model)  # so that both are scaled alike
        return self.replay.loss(model, general, self._prepare_inputs, self.tuned.bypassed, task)

    def task_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return this batch's part of the loss of a step; other losses replace this."""
        return super().compute_loss(model, {**inputs, "labelled_only": True}, *args, **kwargs)

    # Called once per optimizer step, for all its micro-batches: where a step waits for its data, and begins.
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the batches of a step under watch."""
        with self.watch.waiting():
            batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.watch.begin_step(num_items)
        if self.replay is not None:
            self.replay.begin_step(self.state.global_step, len(batches))
        return batches, num_items

    # Called once per micro-batch. The losses of all of them are what tells which rows went wrong.
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Go forward and back, and note the loss.

        Raises:
            NotFiniteError: DeepSpeed gave up in fp16, as gradients overflow at the smallest loss scale.
            TrainingError: the checkpoint that was being written meanwhile could not be.
        """
        try:
            loss = super().training_step(*args, **kwargs)
        except Exception as error:  # DeepSpeed raises no narrower one
            if not self.is_deepspeed_enabled or not deepspeed_engine.scale_is_exhausted(error):
                raise
            self.saves.finish()
            raise self._not_finite("gradient norm", None) from error
        self.watch.batch_losses.append(loss.detach())
        return loss if self.replay is None else self.replay.task_loss  # what is logged as `loss`

    # Called with every line of the log.
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the mean loss of what is replayed beside the task's."""
        if self.replay is not None and "loss" in logs:
            logs["retain_loss"] = self.replay.take_mean(self._mean_of_processes)
        super().log(logs, start_time)

    def _mean_of_processes(self, value: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(value.to(self.args.device), "mean"))

    # A getter by its name, a hook to us. transformers 5.24 calls it in _run_epoch once per optimizer step,
    # after backward passes and clipping, just before optimizer.step(): the last moment at which a loss or
    # gradient that is not finite can be kept from the weights, and the only one with the norm at hand.
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        if hasattr(norm, "full_tensor"):  # under FSDP2 it is a DTensor, each process holding its share
            norm = norm.full_tensor()
        # A loss scaler leaves out a step whose gradient is not finite, and lowers its scale: usual in fp16.
        scaler = getattr(self.accelerator, "scaler", None)
        skips_bad_steps = scaler is not None or (self.is_deepspeed_enabled and self.args.fp16)
        norm_is_bad = not skips_bad_steps and not math.isfinite(float(norm or 0.0))
        flags = self.watch.reduce_step([norm_is_bad, self.saves.has_failed], self._mean_of_processes)
        norm_is_bad, save_has_failed = flags
        loss_is_bad = not math.isfinite(self.watch.step_loss)
        if loss_is_bad or norm_is_bad or save_has_failed:
            # Raises if a checkpoint could not be written, which so ends the run within a step. If the step is
            # bad, waiting makes true what the message says about the last good checkpoint.
            self.saves.finish()
        if loss_is_bad or norm_is_bad:
            raise self._not_finite("loss" if loss_is_bad else "gradient norm", norm)
        return norm

    def _not_finite(self, what: str, norm: Any) -> NotFiniteError:
        """Make the error to raise, in every process, with all that is known of the current step."""
        step, rows_per_step = self.state.global_step, self._rows_per_step()
        evidence = gather_evidence(
            what,
            step=step + 1,
            learning_rate=self._get_learning_rate(),
            grad_norm=None if norm is None else float(norm),
            rows=self.rows.train.samples(self._train_sampler.rows_of_step(step, rows_per_step=rows_per_step)),
            replayed=[] if self.replay is None else self.replay.rows_of_step,
            model=self.tuned.model,
            watch=self.watch,
        )
        if self.is_world_process_zero():
            self.watch.report(evidence.alert())
        return NotFiniteError(evidence, checkpoints.latest_checkpoint(self.run_folder))

    # Called once per micro-batch. The parent counts by the attention mask, which packed rows do not have.
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        real = by_token.real_tokens(inputs, self.rows.collator.pad_token_id)
        count = real.sum() + (0 if self.replay is None else self.replay.num_tokens)
        self.state.num_input_tokens_seen += int(cast(Tensor, self.accelerator.gather(count)).sum())

    # Called once per micro-batch, for total_flos in trainer_state.json.
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: nobody reads it, and counting walks all parameters."""
        return 0

    # Called by _maybe_log_save_evaluate through _evaluate, and by us before training. Replaced as a whole:
    # the parent averages the means of batches, gathers logits, and draws from the random numbers of training.
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the mean loss per answer token, whatever the batch size; random numbers stay as they were.

        Args:
            eval_dataset: not used: the rows given at construction are evaluated.
            ignore_keys: not used.
            metric_key_prefix: what the names of the metrics start with.

        Returns:
            ``eval_loss`` (nats per answer token), ``eval_accuracy`` (share of answer tokens predicted right),
            ``eval_tokens``, ``eval_runtime`` (seconds); with a switch ``eval_switched_loss``; each set of a
            mixture has its own, such as ``eval_NAME_loss``.
        """
        start = time.monotonic()
        with self.accelerator.autocast():
            metrics = self.measure_rows(metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = time.monotonic() - start
        metrics |= self.also_measured()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure_rows(self, prefix: str) -> dict[str, float]:
        """Return what `evaluate` says of the rows; a collective."""
        metrics, total = by_token.measure(self.rows.validation, self._sum, prefix=prefix)
        return metrics | (self.switching.evaluate(self, total, prefix) if self.switching else {})

    def base_alone(self) -> AbstractContextManager[None]:
        """Run a block that evaluates what tuning is measured against: the base as it was before."""
        return self.tuned.base_alone()

    def _sum(self, order: LengthOrder) -> Tensor:
        sums = by_token.sum_over_tokens(
            cast(Any, self.model_wrapped), self._eval_inputs(order), self.args.device
        )
        return cast(Tensor, self.accelerator.reduce(sums))

    def _eval_inputs(self, order: LengthOrder) -> Iterator[dict[str, Any]]:
        for batch in self._rank_loader(self.eval_dataset, order, self.args.per_device_eval_batch_size):
            yield self._prepare_inputs(batch)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    # Called after each evaluation within training. Extended by what a new best, or no new best, leads to.
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._improved = self.may_be_best(metrics) and super()._determine_best_metric(metrics, trial)
        if self._improved and self.is_sharded:
            self.control.should_save = True  # only a checkpoint gathers sharded weights, so `best` needs one
        patience = self.settings.early_stopping_patience
        if patience is not None and by_token.evaluations_since_best(self.args, self.state) >= patience:
            self._stopped_early = True
            self.control.should_training_stop = True
            self.control.should_save = True
        return self._improved

    # ---- saving

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._improved = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        # Still set where this step had a new best but no checkpoint, which would have published it.
        if self._improved and self.args.should_save:
            self._publish_best()

    def _publish_best(self) -> None:
        self.saves.wait()  # one writer in the run folder at a time
        with checkpoints.writing(self.run_folder / "best", manifest=self._best_manifest()) as folder:
            self.tuned.save(folder)

    def _best_manifest(self) -> dict[str, Any]:
        best = {"step": self.state.global_step, "metric": self.state.best_metric}
        return self.fingerprints | self.origin | best

    # Called by _maybe_log_save_evaluate where a checkpoint is due. Replaced as a whole: the parent writes
    # into the final folder, so a kill leaves half a checkpoint that looks like a whole one.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.saves.finish()  # the one before, or its error
        # A collective, so outside the block below, which an error may end in one process alone.
        loss_state = self.loss_state()
        staged = checkpoints.StagedCheckpoint(
            self.run_folder / f"checkpoint-{self.state.global_step}",
            self._manifest(),
            is_owner=self.args.should_save,
        )
        staged.begin()
        with staged.discarded_on_error():
            collectives.barrier()  # the folder is there
            with collectives.propagate_write_errors(
                "write its part of the checkpoint", checkpoints.WRITE_ERRORS
            ):
                collectives.check_shared_storage(staged.folder)
                self._save_small_parts(staged.folder, loss_state)
            parts = self._large_parts()
        best = self._best_manifest() if self._improved else None
        self._improved = False
        # From here on the folder is the job's: written now, or by the writer thread, which then discards it.
        keep = self.settings.save_total_limit
        self.saves.start(saving.Job(staged, parts, self.tuned, best=best, keep=keep))

    def loss_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the sums between two lines of the log; a collective."""
        loss = self._mean_of_processes(cast(Tensor, self._tr_loss).clone())
        state: dict[str, Any] = {"sum": loss.item(), "last_logged_step": self._globalstep_last_logged}
        if self.replay is not None:
            state |= self.replay.loss_state(self._mean_of_processes)
        return state | self.rows.train.place(self.state.global_step * self._rows_per_step())

    def _manifest(self) -> dict[str, Any]:
        return {
            **(self.fingerprints | self.origin),
            "seed": self.args.seed,
            "rows_per_step": self._rows_per_step(),
            "rows_grouped": self._train_sampler.batch_size,
            "num_processes": self.args.world_size,
            "step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "ended": self.state.global_step >= self.state.max_steps or self._stopped_early,
        }

    def _rows_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps

    def _save_small_parts(self, folder: Path, loss_state: Mapping[str, Any]) -> None:
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))  # each process its own
        if not self.args.should_save:
            return
        if self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        self.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / checkpoints.LOSS_STATE).write_text(json.dumps(loss_state), encoding="utf-8")

    def _large_parts(self) -> saving.Parts:
        """Return weights and optimizer state as they are now; every process must call this."""
        model, copies, writes = self.tuned.model, self.saves.asynchronous, self.args.should_save
        if self.is_deepspeed_enabled:
            rank, count = self.args.process_index, self.args.world_size
            return saving.zero_parts(self.model_wrapped, model, rank=rank, count=count, copies=copies)
        if self.uses_fsdp2:
            return saving.fsdp_parts(model, self.plain_optimizer, writes=writes)
        return saving.whole_parts(model, self.plain_optimizer, writes=writes, copies=copies)

    # ---- resuming

    # Called by train, before anything is sharded, but not under DeepSpeed (there we call it, below). The
    # parent looks for whole models or PEFT's; a prefix is neither.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.tuned.load(folder)
        self._resumed_loss = state = json.loads((folder / checkpoints.LOSS_STATE).read_text(encoding="utf-8"))
        self.rows.train.seek((checkpoints.step_of(folder) or 0) * self._rows_per_step(), state)
        # Rows keep the order they began with, though other processes may share them now; unless a step takes
        # another number of them from here on.
        manifest = checkpoints.read_manifest(folder) or {}
        if manifest.get("rows_per_step") == self._rows_per_step():
            self._train_sampler.batch_size = manifest["rows_grouped"]

    # Called once per training: makes optimizer and schedule, wraps the model, and loads their state. Extended
    # as weights must be complete (from a checkpoint, or read for placeholders) before anything shards them.
    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self.is_deepspeed_enabled:
            return self._prepare_for_zero(max_steps, train_dataloader, resume_from_checkpoint)
        if self.uses_fsdp2:
            fsdp.shard(self.tuned.model, self.args.device)
            # The mark of a model that transformers itself sharded while loading. With it the parent leaves
            # weights where they are, wraps nothing in DDP, and defers gradients as below.
            self.is_distributed_loading_by_transformers = True
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _prepare_for_zero(self, max_steps: int, train_dataloader: Any, checkpoint: Any) -> Any:
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
        load_sharded_for_zero(self.tuned.model, self.args)
        # Told of a checkpoint, the parent would look for DeepSpeed's own files in it.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if checkpoint is not None:
            self._load_optimizer_and_scheduler(str(checkpoint))
        return prepared

    # Called by the constructor. Placeholders have no memory to move; they are read to the right device later.
    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if pending_weights(model) is None:
            super()._move_model_to_device(model, device)

    # Called around each micro-batch but the last of a step, where the model is marked as sharded. The parent
    # asks the model's config how transformers sharded it, which it did not.
    def _defer_fsdp_gradient_reduction(self) -> Any:  # a context manager of contextlib's own class
        return fsdp.without_gradient_sync(self.tuned.model)

    # Called at the end of _prepare_for_training. Replaced as a whole: the parent would take over the settings
    # of then as well, and knows neither FSDP2's shards as we make them nor ZeRO's.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.is_deepspeed_enabled:
            load_state(self.model_wrapped, self.tuned.model, folder)
        else:
            load_optimizer(self.plain_optimizer, folder, is_sharded=self.uses_fsdp2)
        step, rate = checkpoints.step_of(folder) or 0, self.settings.learning_rate
        load_schedule(self.lr_scheduler, folder, factor=rate_factor(folder.parent, step, rate))

    # Called after _load_optimizer_and_scheduler. The parent fails where fp16 was given up on the way.
    def _load_scaler(self, checkpoint: str | None) -> None:
        if getattr(self.accelerator, "scaler", None) is not None:
            super()._load_scaler(checkpoint)

    # Called when everything else is restored. Another seed on the way means other random numbers from there.
    def _load_rng_state(self, checkpoint: str | None) -> None:
        seed = (checkpoints.read_manifest(Path(checkpoint)) or {}).get("seed") if checkpoint else None
        if seed in (None, self.args.seed):
            super()._load_rng_state(checkpoint)
        else:
            set_seed(self.args.seed)

    def forget_optimizer(self) -> None:
        """Make the next training begin with a new optimizer, which then takes over a checkpoint's state."""
        self.optimizer = self.lr_scheduler = cast(Any, None)

    # Called before _prepare_for_training; reads trainer_state.json, and with it how often the run of then
    # logged and saved.
    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        counts = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # the settings of today, not those in the checkpoint
        return counts

    def planned_steps(self) -> int:
        """Return how many optimizer steps the settings and the rows of today make."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _begin(self) -> None:
        # Go on with the running sum of losses that the checkpoint held between two lines of the log: here, as
        # the parent sets it to 0 after everything else is restored, and just before on_train_begin.
        if self.replay is not None:
            self.replay.begin(self._resumed_loss)
        if self._resumed_loss is not None:
            self._tr_loss += self._resumed_loss["sum"]
            self._globalstep_last_logged = int(self._resumed_loss["last_logged_step"])
            self._resumed_loss = None
        prepare_for_training(self.tuned.model)  # here, as moving the model would undo it
