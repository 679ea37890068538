"""Everything that decides a training run, for the commands that start one or reckon with one."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError
from glmtune.models.settings import ModelSettings
from glmtune.prefix.settings import PrefixSettings
from glmtune.settings import check_choice, setting
from glmtune.training.distributed.deepspeed_settings import DeepSpeedSettings, effective
from glmtune.training.distributed.launch import LaunchSettings
from glmtune.training.settings import TUNE, LoraSettings, TrainerSettings

DISTRIBUTED = ("fsdp",)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run; `glmtune train` and `glmtune plan` have these settings."""

    model: ModelSettings = setting(ModelSettings, "the base model")
    tune: str = setting("prefix", "what is trained: prefix (P-Tuning v2), lora, or full (every weight)")
    from_scratch: bool = setting(False, "start from random weights; model.source gives config and tokenizer")
    prefix: PrefixSettings | None = setting(PrefixSettings, "the prefix; null unless tune=prefix")
    lora: LoraSettings | None = setting(None, "the adapters; null unless tune=lora")
    data: DataSettings = setting(DataSettings, "the rows to learn")
    trainer: TrainerSettings = setting(TrainerSettings, "how to learn them")
    deepspeed: DeepSpeedSettings | None = setting(None, "ZeRO; null trains without DeepSpeed")
    launch: LaunchSettings = setting(LaunchSettings, "how many processes train together, and where")
    distributed: str | None = setting(
        None, "fsdp: divide weights among processes by FSDP2; null: each holds all, or see deepspeed"
    )
    output_dir: str = setting("runs/train", "folder of the run")
    seed: int = setting(42, "seed of everything random")
    resume: str = setting("auto", "auto, never, force, or the path of a checkpoint-N to go on from")

    def __post_init__(self) -> None:
        """Check what only the whole can tell.

        Raises:
            ConfigError: settings contradict each other.
        """
        check_choice("tune", self.tune, TUNE)
        for name, value, recipe in (("prefix", self.prefix, "ptuning"), ("lora", self.lora, "lora")):
            if self.tune == name and value is None:
                raise ConfigError(f"`{name}` is null, but `tune={name}` needs it. Use `+recipe={recipe}`.")
            if self.tune != name and value is not None:
                raise ConfigError(
                    f"`{name}` has settings, but `tune` is `{self.tune}`, which ignores them. "
                    f"Add `{name}=null`."
                )
        self._check_sharding()
        if self.model.quantization_activations is not None:
            raise ConfigError(
                f"`model.quantization_activations` is `{self.model.quantization_activations}`, but training "
                "computes with the activations as they are. Leave it out; it is a setting of answering."
            )
        if self.tune == "full" and self.model.method is not None:
            raise ConfigError(
                f"`model.quantization` is `{self.model.method}`, but `tune` is `full`, and codes cannot be "
                "trained. Leave it out, or tune a prefix or LoRA."
            )
        if self.from_scratch and self.tune != "full":
            raise ConfigError(
                f"`from_scratch` is true, but `tune` is `{self.tune}`, which freezes the base, and a base of "
                "random weights is of no use. Add `tune=full prefix=null`."
            )
        for name in ("eval_steps", "early_stopping_patience"):
            value = getattr(self.trainer, name)
            if value is not None and self.data.validation_file is None:
                raise ConfigError(
                    f"`trainer.{name}` is {value}, but `data.validation_file` is null, so nothing can be "
                    f"evaluated. Name a file, or add `trainer.{name}=null`."
                )

    @property
    def loads_sharded(self) -> bool:
        """Whether a process keeps its shards of the base only, unless the base turns out to hold codes.

        The whole base is needed to compute a prefix from a text, or codes from weights.
        """
        shards = self.distributed == "fsdp" or (
            self.deepspeed is not None and effective(self.deepspeed).stage == 3
        )
        whole = self.prefix is not None and self.prefix.init == "text"
        return shards and not (whole or self.from_scratch or self.model.method is not None)

    def _check_sharding(self) -> None:
        """Check what shards the weights over processes."""
        if self.distributed is not None:
            check_choice("distributed", self.distributed, DISTRIBUTED)
        fsdp = self.distributed and f"distributed={self.distributed}"
        shards_by = fsdp or (self.deepspeed and "deepspeed")
        if self.distributed is not None and self.deepspeed is not None:
            raise ConfigError(
                f"`distributed` is `{self.distributed}` and `deepspeed` is set, but only one of them can "
                "divide the weights. Leave one out."
            )
        if self.trainer.torch_compile and shards_by:
            raise ConfigError(
                f"`trainer.torch_compile` is true, but `{shards_by}` gathers and divides weights between the "
                "layers. Leave one of them out: `trainer.torch_compile=false`."
            )
        if self.trainer.torch_compile and self.tune == "prefix":
            raise ConfigError(
                "`trainer.torch_compile` is true, but `tune` is `prefix`: every layer reads its own part of "
                "the prefix, so each would be compiled by itself. Use `trainer.torch_compile=false`, or "
                "`+recipe=lora`."
            )
        if self.distributed == "fsdp" and self.model.method is not None:
            raise ConfigError(
                f"`distributed` is `fsdp`, but `model.quantization` is `{self.model.method}`, and codes are "
                "not divided. Leave one of them out: an INT4 base is small enough for every process."
            )
