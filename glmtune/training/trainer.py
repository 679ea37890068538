"""`transformers.Trainer` plus exact resuming, atomic checkpoints and token-weighted evaluation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from glmtune.files import partial_of
from glmtune.labels import IGNORE_INDEX
from glmtune.models.placeholders import waits_for
from glmtune.quantization.kernels.for_training import prepare_for_training
from glmtune.training.adapt import Tuned
from glmtune.training.checkpoints import folder as checkpoints
from glmtune.training.checkpoints.saving import Job, Saves, parts_of
from glmtune.training.distributed import collectives, deepspeed_engine, fsdp
from glmtune.training.distributed.sharded_loading import fill_for_zero
from glmtune.training.distributed.zero_state import load_state, refuse_other_kind
from glmtune.training.rank_batches import FilledRows, RankBatches
from glmtune.training.row_order import EpochSampler, LengthOrder
from glmtune.training.settings import WatchSettings
from glmtune.training.watching.callback import TrainingWatch
from glmtune.training.watching.evidence import not_finite
from glmtune.training.watching.rollback_log import rate_factor, scale_rate

LOSS_STATE = "loss_state.json"


class GlmTrainer(Trainer):
    """Trains the tuned part of a model; a killed run that goes on gives the very same numbers."""

    def __init__(
        self,
        tuned: Tuned,
        args: TrainingArguments,
        *,
        collator: Callable[[list[Any]], dict[str, Tensor]],
        train_rows: Dataset[Any] | datasets.Dataset,
        train_lengths: Sequence[int],
        eval_rows: Dataset[Any] | datasets.Dataset | None = None,
        eval_lengths: Sequence[int] = (),
        pad_token_id: int = 0,
        group_by_length: bool = True,
        shuffle: bool = True,
        keep_checkpoints: int | None = None,
        patience: int | None = None,
        watch: WatchSettings | None = None,
        divides: bool = False,
        async_save: bool = False,
        facts: dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Wire everything together.

        Args:
            tuned: the model and how its tuned part is saved.
            args: see ``glmtune.training.arguments``; ``output_dir`` is the run folder.
            collator: makes a batch (``input_ids``, ``labels`` ``[B, S]``, and a mask or positions) of rows.
            train_rows: encoded rows to learn.
            train_lengths: tokens of every training row.
            eval_rows: encoded rows for evaluation, if any.
            eval_lengths: tokens of every evaluation row.
            pad_token_id: not counted as a real token in batches without a mask.
            group_by_length: batch rows of similar length.
            shuffle: draw rows at random; without it they come in the file's order.
            keep_checkpoints: newest checkpoints kept; None keeps all.
            patience: evaluations without a new best after which training stops; None never stops early.
            watch: what is reported, and how often the run may go back; None: the defaults.
            divides: divide the weights among the processes by FSDP2.
            async_save: write checkpoints beside training; `saves.finish` waits for the last one.
            facts: plain values kept in each checkpoint's manifest and checked on resuming.
            callbacks: added to the trainer's own.
        """
        self.tuned = tuned
        self.run_folder = Path(str(args.output_dir))
        self.keep_checkpoints = keep_checkpoints
        self.patience = patience
        self.pad_token_id = pad_token_id
        self.facts = dict(facts or {})
        self._train_sampler = EpochSampler(
            train_lengths,
            batch_size=args.per_device_train_batch_size * args.world_size,
            group_by_length=group_by_length,
            seed=args.seed,
            shuffle=shuffle,
        )
        self.watch = TrainingWatch(watch or WatchSettings(), self.run_folder)
        self.divides = divides
        self.saves = Saves(beside=async_save, timeout_seconds=args.ddp_timeout)
        self._eval_lengths = eval_lengths
        self._improved = False
        self._stopped_early = False
        self._resumed_loss: dict[str, float] | None = None
        super().__init__(
            model=tuned.model,
            args=args,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            callbacks=[_Flow(self), self.watch, *callbacks],
        )
        self.remove_callback(PrinterCallback)

    # ---- order of rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._train_sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return LengthOrder(self._eval_lengths)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's micro-batches of an epoch."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        return self._shared_loader(
            self.train_dataset, self._train_sampler, self.args.per_device_train_batch_size
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this process's batches of the evaluation."""
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        order = LengthOrder(self._eval_lengths)
        return self._shared_loader(self.eval_dataset, order, self.args.per_device_eval_batch_size)

    def _shared_loader(self, rows: Any, order: Sampler[int], batch_size: int) -> DataLoader[Any]:
        batches = RankBatches(
            order, batch_size=batch_size, rank=self.args.process_index, num_processes=self.args.world_size
        )
        return DataLoader(
            FilledRows(rows),
            batch_sampler=batches,
            collate_fn=cast(Any, self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
        )

    # ---- loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Let the model form logits only where there is something to learn."""
        return super().compute_loss(model, {**inputs, "labelled_only": True}, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the batches of a step under watch."""
        with self.watch.waiting():
            batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.watch.begin_step(num_items)
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Go forward and back, and note the loss."""
        try:
            loss = super().training_step(*args, **kwargs)
        except Exception as error:  # DeepSpeed raises no narrower one
            if not self.is_deepspeed_enabled or not deepspeed_engine.scale_is_exhausted(error):
                raise
            self.saves.finish()
            raise not_finite(self, "gradient norm", None) from error
        self.watch.batch_losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last moment before the weights change: what is not finite here must not reach them.
        norm: Any = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        scaler = getattr(self.accelerator, "scaler", None)
        skips = scaler is not None or (self.is_deepspeed_enabled and self.args.fp16)  # such a step by itself
        bad_norm = not skips and not math.isfinite(float(norm or 0.0))
        loss = torch.stack(self.watch.batch_losses).sum().double()
        found = torch.stack([loss, *torch.tensor([bad_norm, self.saves.has_failed]).to(loss)])
        if self.args.world_size > 1:  # all stop, or none does
            found = cast(Tensor, self.accelerator.reduce(found, "mean"))
        self.watch.step_loss = found[0].item()
        bad_loss, (bad_norm, bad_save) = not math.isfinite(self.watch.step_loss), map(bool, found[1:])
        if bad_save or bad_loss or bad_norm:
            self.saves.finish()  # so that what is said of checkpoints is true, or to say that they fail
        if bad_loss or bad_norm:
            raise not_finite(self, "loss" if bad_loss else "gradient norm", norm)
        return norm

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        real = mask if mask is not None else inputs["input_ids"] != self.pad_token_id
        real = real & (inputs["labels"] != IGNORE_INDEX).any()  # a filler has no label: it counts nothing
        self.state.num_input_tokens_seen += int(cast(Tensor, self.accelerator.gather(real.sum())).sum())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: nobody reads it, and counting walks all parameters at every step."""
        return 0

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the mean loss per answer token, whatever the batch size.

        The random numbers of training stay as they were.

        Args:
            eval_dataset: not used; the rows given at construction are evaluated.
            ignore_keys: not used.
            metric_key_prefix: what the names of the metrics start with.

        Returns:
            ``eval_loss`` (nats per answer token), ``eval_accuracy`` (share of answer tokens that are the most
            probable ones), ``eval_tokens``, ``eval_runtime`` (seconds).
        """
        start = time.monotonic()
        loader = self.get_eval_dataloader()
        model = self.model_wrapped
        assert model is not None
        was_training = model.training
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad(), self.accelerator.autocast():
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                labels = inputs["labels"][..., 1:]
                count = (labels != IGNORE_INDEX).sum()
                output = model(**inputs, num_items_in_batch=count.clamp(min=1), labelled_only=True)
                hits = (output["predictions"] == labels[labels != IGNORE_INDEX]).sum()
                sums += torch.stack([output["loss"].double() * count, hits.double(), count.double()])
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        loss_sum, num_hits, tokens = cast(Tensor, self.accelerator.reduce(sums)).tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss_sum / max(tokens, 1),
            f"{metric_key_prefix}_accuracy": num_hits / max(tokens, 1),
            f"{metric_key_prefix}_tokens": int(tokens),
            f"{metric_key_prefix}_runtime": time.monotonic() - start,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._improved = super()._determine_best_metric(metrics, trial)
        if self._improved and (self.is_deepspeed_enabled or self.divides):
            self.control.should_save = True  # only a checkpoint puts divided weights together
        key = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        since = [
            entry["step"]
            for entry in self.state.log_history
            if key in entry and entry["step"] > (self.state.best_global_step or 0)
        ]
        if self.patience is not None and len(since) >= self.patience:
            self._stopped_early = True
            self.control.should_training_stop = True
            self.control.should_save = True
        return self._improved

    # ---- saving

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._improved = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._improved and self.args.should_save:
            self._publish_best()

    def _publish_best(self) -> None:
        self.saves.wait()  # one writer in the run folder at a time
        at_this_step = self.run_folder / f"checkpoint-{self.state.global_step}"
        best, facts = self.run_folder / "best", self._best_facts()
        if checkpoints.read_manifest(at_this_step) is not None:
            checkpoints.publish(at_this_step, best, facts=facts)
        else:
            with checkpoints.writing(best, facts=facts) as folder:
                self.tuned.save(folder)

    def _best_facts(self) -> dict[str, Any]:
        return {**self.facts, "step": self.state.global_step, "metric": self.state.best_metric}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.saves.finish()
        step = self.state.global_step
        final = self.run_folder / f"checkpoint-{step}"
        ended = step >= self.state.max_steps or self._stopped_early
        facts = {**self.facts, **self._batch_facts(), "step": step}
        facts |= {"max_steps": self.state.max_steps, "ended": ended}
        loss = cast(Tensor, self.accelerator.reduce(cast(Tensor, self._tr_loss).clone(), "mean"))
        writes = self.args.should_save
        # Every process adds its own part to the folder that the first one opens and seals.
        opened = checkpoints.writing(final, facts=facts) if writes else nullcontext(partial_of(final))
        with ExitStack() as stack:
            folder = stack.enter_context(opened)
            collectives.wait()
            with collectives.agreed("write its part of the checkpoint", checkpoints.WRITE_ERRORS):
                collectives.check_shared(folder)
                self._save_small_parts(folder, loss.item())
            parts = parts_of(self, folder)
            rest = stack.pop_all()
        job = Job(
            opened=rest,
            folder=folder,
            final=final,
            facts=facts,
            best=self._best_facts() if self._improved and self.saves.beside else None,
            parts=parts,
            tuned=self.tuned,
            writes=writes,
            keep=self.keep_checkpoints,
        )
        self._improved = self._improved and job.best is None
        self.saves.start(job)

    def _save_small_parts(self, folder: Path, loss_sum: float) -> None:
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if not self.args.should_save:
            return
        if self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        self.state.save_to_json(str(folder / "trainer_state.json"))
        loss_state = {"sum": loss_sum, "last_logged_step": self._globalstep_last_logged}
        (folder / LOSS_STATE).write_text(json.dumps(loss_state), encoding="utf-8")

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, without what accelerate puts around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _batch_facts(self) -> dict[str, int]:
        return {
            "rows_per_step": self._rows_per_forward() * self.args.gradient_accumulation_steps,
            "rows_grouped": self._train_sampler.batch_size,
            "num_processes": self.args.world_size,
        }

    def _rows_per_forward(self) -> int:
        return self.args.per_device_train_batch_size * self.args.world_size

    # ---- resuming

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.tuned.load(folder)
        self._take_over(folder)

    def _take_over(self, folder: Path) -> None:
        self._resumed_loss = json.loads((folder / LOSS_STATE).read_text(encoding="utf-8"))
        # Rows keep the order they began with, though other processes may share them now.
        manifest = checkpoints.read_manifest(folder) or {}
        self._train_sampler.batch_size = manifest.get("rows_grouped", self._train_sampler.batch_size)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)  # before the weights are divided
        if self.is_deepspeed_enabled and waits_for(self.tuned.model) is not None:
            self._fill_for_zero()
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            # The parent looks for DeepSpeed's own files then, so it is told of no checkpoint.
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._load_optimizer_and_scheduler(str(resume_from_checkpoint))
            return prepared
        if self.divides:
            fsdp.divide(self.tuned.model, self.args.device)
            # So transformers calls a model that is divided already, and leaves its weights to it.
            self.is_distributed_loading_by_transformers = True
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _fill_for_zero(self) -> None:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        config = cast(Any, self.args.hf_deepspeed_config).config
        fill_for_zero(self.tuned.model, config, device=self.args.device, dtype=dtype)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if waits_for(model) is None:
            super()._move_model_to_device(model, device)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        model = cast(Any, self.tuned.model)
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            refuse_other_kind(Path(checkpoint), is_zero=self.is_deepspeed_enabled)
        if self.divides and checkpoint is not None:
            fsdp.load_optimizer(self.plain_optimizer, Path(checkpoint))
            state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
            cast(LambdaLR, self.lr_scheduler).load_state_dict(state)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            load_state(self.model_wrapped, self.tuned.model, Path(checkpoint))
        if isinstance(self.lr_scheduler, LambdaLR):
            step = checkpoints.step_of(Path(checkpoint)) or 0
            scale_rate(self.lr_scheduler, rate_factor(self.run_folder, step))

    def forget_optimizer(self) -> None:
        """Make the next training begin with a new optimizer, which then takes over a checkpoint's state."""
        self.optimizer = self.lr_scheduler = cast(Any, None)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        counts = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # the settings of today, not those in the checkpoint
        return counts

    def has_ended(self, checkpoint: Path) -> bool:
        """Tell whether a checkpoint is the last one of its run; if so, take over its weights and its state.

        Args:
            checkpoint: a complete one. A run whose number of steps was raised since has not ended.
        """
        manifest = checkpoints.read_manifest(checkpoint) or {}
        planned = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if not manifest.get("ended") or manifest.get("max_steps") != planned:
            return False
        self.tuned.load(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return True

    def restore_loss(self) -> None:
        """Go on with the running sum of losses that the checkpoint held between two lines of the log."""
        if self._resumed_loss is not None:
            self._tr_loss += self._resumed_loss["sum"]
            self._globalstep_last_logged = int(self._resumed_loss["last_logged_step"])
            self._resumed_loss = None


class _Flow(TrainerCallback):
    """What the trainer's own flow leaves out.

    Tells the sampler its epoch, also in the middle of a resumed one; restores the running loss; logs the last
    step, whatever ``logging_steps`` is.
    """

    def __init__(self, trainer: GlmTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_loss()
        if not (self._trainer.is_deepspeed_enabled or self._trainer.divides):
            prepare_for_training(self._trainer.tuned.model)  # here, as moving the model would undo it

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._train_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
