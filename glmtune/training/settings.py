"""How a model is trained: the settings of the trainer, under the names of `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.settings import check_choice, check_range, setting
from glmtune.switch.settings import SwitchSettings
from glmtune.tracking.services import TRACKERS

TUNE = ("prefix", "full", "lora")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
# Optimizers, and the package that has them. Eight bits hold Adam's moments in a quarter of the memory, paged
# ones lie in host memory where the GPU's is short.
OPTIMIZERS: dict[str, str | None] = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "adafactor": None,
    "sgd": None,
    "adamw_torch_8bit": "torchao",
    "adamw_bnb_8bit": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "paged_adamw_32bit": "bitsandbytes",
}
# Metrics of the evaluation, and whether a larger one is the better one.
METRICS = {"loss": False, "accuracy": True}


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """How the weights move; part of ``TrainerSettings``."""

    learning_rate: float = setting(2e-2, "peak learning rate")
    lr_scheduler_type: str = setting("linear", "linear, cosine, constant, constant_with_warmup, ...")
    warmup_steps: int = setting(0, "optimizer steps of linear warm-up")
    warmup_ratio: float = setting(0.0, "warm-up as a share of all steps, instead of warmup_steps")
    optim: str = setting(
        "adamw_torch",
        "adamw_torch, adamw_torch_fused, adafactor, sgd; adamw_bnb_8bit, adamw_torch_8bit: 8-bit moments; "
        "paged_adamw_8bit, paged_adamw_32bit: moments that move to host memory when a GPU's is short",
    )
    weight_decay: float = setting(0.0, "decoupled weight decay")
    adam_beta1: float = setting(0.9, "decay of the first moment")
    adam_beta2: float = setting(0.999, "decay of the second moment")
    adam_epsilon: float = setting(1e-8, "added to the denominator")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 does not clip")


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """What is logged, evaluated and saved, and when; part of ``TrainerSettings``."""

    logging_steps: int = setting(10, "steps between two lines of the log")
    eval_steps: int | None = setting(
        None, "steps between two evaluations; null: as often as checkpoints are saved"
    )
    save_steps: int = setting(1000, "steps between two checkpoints")
    async_save: bool = setting(
        False,
        "write checkpoints while training goes on, from a copy in host memory: 12 bytes for every number "
        "that AdamW trains, divided under ZeRO",
    )
    save_total_limit: int | None = setting(None, "checkpoints kept, the newest ones; null keeps all")
    metric_for_best_model: str = setting("loss", "what chooses `best`: loss, or accuracy (of answer tokens)")
    early_stopping_patience: int | None = setting(None, "stop after so many evaluations without a new best")
    report_to: list[str] = setting(lambda: ["tensorboard"], "trackers: tensorboard, wandb, mlflow, swanlab")


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """What is reported, and what follows a loss that is not finite; part of ``TrainerSettings``.

    Two rollbacks at half the rate each end at a quarter of it, and a rate that is too high is seldom more
    than four times too high; what still fails then has another cause, which more attempts would only hide.
    """

    max_rollbacks: int = setting(
        2, "times a run goes back to its last checkpoint after a loss or gradient that is not finite; 0: stop"
    )
    rollback_rate: float = setting(0.5, "every rollback multiplies the learning rate by this")
    spike_deviations: float = setting(
        10.0, "a loss so many (robust) deviations above its recent median is reported; 0: none is"
    )
    stall_seconds: float = setting(60.0, "waiting so long for one batch is reported; 0: never")

    def check_watch(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of its range.
        """
        check_range("trainer.max_rollbacks", self.max_rollbacks, low=0)
        check_range("trainer.spike_deviations", self.spike_deviations, low=0)
        check_range("trainer.stall_seconds", self.stall_seconds, low=0)
        if not 0 < self.rollback_rate < 1:
            raise ConfigError(
                f"`trainer.rollback_rate` is {self.rollback_rate}, but it must lie between 0 and 1: every "
                "rollback lowers the learning rate. Use 0.5."
            )


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(OptimizationSettings, RecordSettings, WatchSettings):
    """The trainer's settings, flat as users of `transformers` know them."""

    max_steps: int | None = setting(3000, "optimizer steps in all; null: num_train_epochs decides")
    num_train_epochs: float | None = setting(None, "passes over the data, instead of max_steps")
    per_device_train_batch_size: int = setting(1, "rows in one forward pass")
    per_device_eval_batch_size: int = setting(8, "rows in one forward pass of the evaluation")
    gradient_accumulation_steps: int = setting(16, "forward passes in one optimizer step")
    shuffle: bool = setting(True, "draw rows at random; false keeps the file's order, for a curriculum")
    group_by_length: bool | None = setting(
        None, "put rows of similar length into one batch: less padding; null: true, but with data.streaming"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, a third slower")
    torch_compile: bool = setting(
        False, "compile the layers: faster steps after minutes of compiling; for GPUs and long runs"
    )
    precision: str = setting("auto", "auto, fp32, bf16 or fp16: what the forward pass computes in")
    dataloader_num_workers: int = setting(0, "processes that prepare batches; 0: the training process")
    num_threads: int | None = setting(None, "CPU threads of torch; null: torch decides")

    def __post_init__(self) -> None:
        """Check every rule.

        Raises:
            ConfigError: the first rule broken, with the value and the way out.
        """
        check_choice("trainer.lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        check_choice("trainer.optim", self.optim, OPTIMIZERS)
        check_choice("trainer.precision", self.precision, PRECISIONS)
        check_choice("trainer.metric_for_best_model", self.metric_for_best_model, METRICS)
        for tracker in self.report_to:
            check_choice("trainer.report_to", tracker, TRACKERS)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps"):
            check_range(f"trainer.{name}", getattr(self, name), low=1)
        for name in ("gradient_accumulation_steps", "save_steps"):
            check_range(f"trainer.{name}", getattr(self, name), low=1)
        for name in ("max_steps", "eval_steps", "save_total_limit", "early_stopping_patience", "num_threads"):
            if getattr(self, name) is not None:
                check_range(f"trainer.{name}", getattr(self, name), low=1)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            check_range(f"trainer.{name}", getattr(self, name), low=0)
        check_range("trainer.dataloader_num_workers", self.dataloader_num_workers, low=0)
        check_range("trainer.warmup_ratio", self.warmup_ratio, low=0, high=1)
        check_range("trainer.adam_beta1", self.adam_beta1, low=0, high=1)
        check_range("trainer.adam_beta2", self.adam_beta2, low=0, high=1)
        self.check_watch()
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.max_steps is None and self.num_train_epochs is None:
            raise ConfigError(
                "`trainer.max_steps` and `trainer.num_train_epochs` are both null, but one of them must say "
                "when training ends. Set one, such as `trainer.max_steps=3000`."
            )
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError(
                f"`trainer.max_steps` is {self.max_steps} and `trainer.num_train_epochs` is "
                f"{self.num_train_epochs}, but only one of them can say when training ends. "
                "Add `trainer.max_steps=null` to count epochs."
            )
        if self.num_train_epochs is not None and self.num_train_epochs <= 0:
            raise ConfigError(f"`trainer.num_train_epochs` is {self.num_train_epochs}, but must be above 0.")
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                f"`trainer.warmup_steps` is {self.warmup_steps} and `trainer.warmup_ratio` is "
                f"{self.warmup_ratio}, but only one of them can set the warm-up. Leave one at 0."
            )


@dataclass(frozen=True, kw_only=True)
class LoraSettings(SwitchSettings):
    """Low-rank adapters (PEFT) on linear layers of the frozen base."""

    rank: int = setting(8, "rank of the update")
    alpha: float = setting(32.0, "the update is scaled by alpha / rank")
    dropout: float = setting(0.1, "dropout on the adapters' input")
    targets: list[str] | None = setting(
        None, "names of the linear layers; null: the projections to queries, keys and values"
    )

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of range, or the list of targets is empty.
        """
        check_range("lora.rank", self.rank, low=1)
        check_range("lora.dropout", self.dropout, low=0, high=0.99)
        self.check_switch("lora")
        if self.alpha <= 0:
            raise ConfigError(f"`lora.alpha` is {self.alpha}, but it must be above 0.")
        if self.targets == []:
            raise ConfigError(
                "`lora.targets` is empty, but LoRA needs a layer to adapt, such as `[q_proj]`. "
                "Use null for the projections to queries, keys and values."
            )
