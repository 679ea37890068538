"""Everything that decides a training run, for the commands that start one or reckon with one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from glmtune.data.settings import PREFERENCE, DataSettings
from glmtune.errors import ConfigError
from glmtune.models.settings import ModelSettings
from glmtune.preference.settings import BASE, PreferenceSettings
from glmtune.prefix.settings import PrefixSettings
from glmtune.retention.settings import RetainSettings, RetentionSettings
from glmtune.settings import check_choice, setting
from glmtune.training.distributed.deepspeed_settings import DeepSpeedSettings, effective
from glmtune.training.distributed.launch import LaunchSettings
from glmtune.training.settings import TUNE, LoraSettings, TrainerSettings

DISTRIBUTED = ("fsdp",)
BEGINS_WITH = {
    "prefix": ("prefix_path", "a prefix", "ptuning"),
    "lora": ("adapter_path", "an adapter", "lora"),
    "full": ("init_from", "a model", "full"),
}
"""By `tune`: the setting that names what a run begins with, what that is, and its recipe."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run; `glmtune train` and `glmtune plan` have these settings."""

    model: ModelSettings = setting(ModelSettings, "the base model")
    tune: str = setting("prefix", "what is trained: prefix (P-Tuning v2), lora, or full (every weight)")
    prefix_path: str | None = setting(
        None,
        "tune=prefix: begin with this prefix: a run folder, a checkpoint, or a file (also the official "
        "pytorch_model.bin)",
    )
    adapter_path: str | None = setting(
        None, "tune=lora: begin with this adapter: a run folder or one of its checkpoints"
    )
    init_from: str | None = setting(
        None, "tune=full: begin with these weights: a run folder, one of its checkpoints, or an export"
    )
    from_scratch: bool = setting(False, "start from random weights; model.source gives config and tokenizer")
    prefix: PrefixSettings | None = setting(PrefixSettings, "the prefix; null unless tune=prefix")
    lora: LoraSettings | None = setting(None, "the adapters; null unless tune=lora")
    data: DataSettings = setting(DataSettings, "the rows to learn")
    trainer: TrainerSettings = setting(TrainerSettings, "how to learn them")
    retention: RetentionSettings | None = setting(
        RetentionSettings, "what is measured of the base's answers; null: nothing"
    )
    retain: RetainSettings | None = setting(None, "replay that keeps them: normal, strict, or null for none")
    preference: PreferenceSettings | None = setting(
        None, "learn which answers are preferred: dpo, ipo, orpo, kto; null: learn the answers themselves"
    )
    deepspeed: DeepSpeedSettings | None = setting(None, "ZeRO; null trains without DeepSpeed")
    launch: LaunchSettings = setting(LaunchSettings, "how many processes train together, and where")
    distributed: str | None = setting(
        None, "fsdp: divide weights among processes by FSDP2; null: each holds all, or see deepspeed"
    )
    output_dir: str = setting("runs/train", "folder of the run")
    seed: int = setting(42, "seed of everything random")
    resume: str = setting(
        "auto", "auto, never, force (go on with other settings), or a checkpoint-N, also of another run"
    )

    def __post_init__(self) -> None:
        """Check what only the whole can tell.

        Raises:
            ConfigError: settings contradict each other.
        """
        if self.preference is not None and self.data.layout == "auto":
            # Detected among the layouts that have what is compared; config.yaml says so.
            object.__setattr__(self, "data", replace(self.data, layout=PREFERENCE))
        check_choice("tune", self.tune, TUNE)
        prefers = self.preference is not None
        recipes = ("dpo", "dpo_lora") if prefers else ("ptuning", "lora")
        for name, value, recipe in zip(("prefix", "lora"), (self.prefix, self.lora), recipes, strict=True):
            if self.tune == name and value is None:
                raise ConfigError(f"`{name}` is null, but `tune={name}` needs it. Use `+recipe={recipe}`.")
            if self.tune != name and value is not None:
                raise ConfigError(
                    f"`{name}` has settings, but `tune` is `{self.tune}`, which ignores them. "
                    f"Add `{name}=null`."
                )
        self.data.check_answers()
        if self.trainer.group_by_length is None:
            # Decided here, so that a run's folder and all behind it know one or the other.
            decided = replace(self.trainer, group_by_length=not self.data.streaming)
            object.__setattr__(self, "trainer", decided)
        self._check_streaming()
        if self.data.mix is not None and not self.trainer.shuffle:
            raise ConfigError(
                "`data.mix` is given and `trainer.shuffle` is false, but the rows of several sets have no"
                " order of one file to keep. Leave one of them out."
            )
        self._check_beginning()
        self._check_retain()
        self._check_preference()
        self._check_sharding()
        if (value := self.model.quantization_activations) is not None:
            raise ConfigError(
                f"`model.quantization_activations` is `{value}`, but training takes activations as they are. "
                "Leave it out; it is a setting of answering."
            )
        if self.model.is_split:
            raise ConfigError(
                "`model.device_map` or `model.num_gpus` is given, but training splits no model by layers: "
                "with `distributed=fsdp` or `deepspeed=zero3` several GPUs share its weights. Leave it out; "
                "it is a setting of answering."
            )
        for name, value in self._asked_codes.items():
            if self.tune == "full" and value is not None:
                raise ConfigError(
                    f"`model.{name}` is `{value}`, but `tune` is `full`, and codes cannot be trained. "
                    "Leave it out, or tune a prefix or LoRA."
                )
        if self.from_scratch and self.tune != "full":
            raise ConfigError(
                f"`from_scratch` is true, but `tune` is `{self.tune}`, which freezes the base, and a base of "
                "random weights is of no use. Add `tune=full prefix=null`."
            )
        self._check_retention()
        for name in ("eval_steps", "early_stopping_patience"):
            value = getattr(self.trainer, name)
            if value is not None and not self.data.has_validation:
                raise ConfigError(
                    f"`trainer.{name}` is {value}, but `data.validation_file` is null, so nothing can be "
                    "evaluated. Name a file, keep some training rows for it (`data.validation_frac=0.1`), or "
                    f"add `trainer.{name}=null`."
                )

    def _check_streaming(self) -> None:
        """Check that nothing is asked of streamed rows that all of them would have to tell."""
        if not self.data.streaming:
            return
        for name, wanted, why in (
            (
                "max_steps",
                None,
                "nobody knows how many make an epoch; `trainer.num_train_epochs=null` with it",
            ),
            ("group_by_length", False, "nobody knows their lengths before"),
            ("dataloader_num_workers", 0, "one process reads them, in one order"),
        ):
            value = getattr(self.trainer, name)
            if (value is None) if wanted is None else value != wanted:
                way = "1000" if wanted is None else str(wanted).lower()
                raise ConfigError(
                    f"`trainer.{name}` is {'null' if value is None else str(value).lower()}, but"
                    f" `data.streaming` is true: rows are read as they are learnt, and {why}. Use"
                    f" `trainer.{name}={way}`."
                )

    def _check_retain(self) -> None:
        """Check that there is a base whose answers can be kept."""
        if self.retain is None:
            return
        if self.from_scratch:
            raise ConfigError(
                "`retain` has settings and `from_scratch` is true, but random weights have no answers worth "
                "keeping. Add `retain=null`."
            )
        if self.tune == "full" and self.retain.loss == "kl":
            raise ConfigError(
                "`retain.loss` is `kl` and `tune` is `full`, but once training has begun there is no base to "
                "compare with: its weights are those being trained. Use `retain.loss=answers`, or tune a "
                "prefix or LoRA."
            )

    def _check_preference(self) -> None:
        """Check that rows are compared exactly where they are to be, and against something."""
        judges, preference = self.data.layout == PREFERENCE, self.preference
        if preference is None:
            if judges:
                raise ConfigError(
                    "`data.layout` is `preference`, but `preference` is null, so nothing compares answers."
                    " Add `preference=dpo` (or ipo, orpo, kto), or use `+recipe=dpo`."
                )
            return
        if not judges:
            raise ConfigError(
                f"`preference` has settings, but `data.layout` is `{self.data.layout}`, whose rows have one"
                " answer. Use `data=preference`, the shipped pairs, or `data=files data.train_file=FILE` with"
                " rows of your own (`chosen`, `rejected`)."
            )
        if not self.data.loss_on_thoughts and not preference.takes_pairs:
            raise ConfigError(
                "`data.loss_on_thoughts` is false and `preference.loss` is `kto`, but kto also reads answers"
                " behind other prompts, thoughts and all. Use `data.loss_on_thoughts=true`, or another loss."
            )
        if self.from_scratch:
            raise ConfigError(
                "`preference` has settings and `from_scratch` is true, but random weights prefer nothing that"
                " could be moved. Add `preference=null`."
            )
        if preference.reference == BASE and self.tune == "full":
            raise ConfigError(
                "`preference.reference` is `base` and `tune` is `full`, but once training has begun there is"
                " no base to measure against: its weights are those being trained. Use"
                " `preference.reference=start`, which reads all answers once before the first step."
            )
        for name, group in (("prefix", self.prefix), ("lora", self.lora)):
            if group is not None and group.switch:
                raise ConfigError(
                    f"`{name}.switch` is true and `preference` has settings, but a switch keeps what is tuned"
                    " to the prompts of one task, and a preference is meant for all. Add"
                    f" `{name}.switch=false`."
                )

    def _check_retention(self) -> None:
        """Check that what is asked of retention can be measured."""
        retention = self.retention
        if retention is None:
            return
        if retention.target is not None and not self.data.has_validation:
            raise ConfigError(
                f"`retention.target` is {retention.target}, but `data.validation_file` is null, so nothing "
                "is evaluated and there is no `best` to choose. Name a file, keep some training rows for it "
                "(`data.validation_frac=0.1`), or add `retention.target=null`."
            )
        for name in ("target", "exam"):
            if self.from_scratch and (value := getattr(retention, name)) is not None:
                raise ConfigError(
                    f"`retention.{name}` is {value}, but `from_scratch` is true: random weights answer "
                    "nothing that could be kept. Add `retention=null`."
                )

    def _check_beginning(self) -> None:
        """Check that what the run begins with is of the kind that it tunes."""
        for tune, (name, what, recipe) in BEGINS_WITH.items():
            path = getattr(self, name)
            if path is None or tune == self.tune:
                continue
            own = BEGINS_WITH[self.tune][0]
            way = f"Begin with `{own}=`, or tune {what} further: `+recipe={recipe} {name}={path}`."
            if tune == "full":
                way = f"To tune {BEGINS_WITH[self.tune][1]} over these weights, name them as `model.source`."
            raise ConfigError(f"`{name}` is `{path}`, but `tune` is `{self.tune}`. {way}")
        if self.from_scratch and self.init_from is not None:
            raise ConfigError(
                f"`from_scratch` is true and `init_from` is `{self.init_from}`, but a run begins with one of "
                "them. Leave one out."
            )

    @property
    def reference(self) -> str | None:
        """What preferences are measured against: ``base`` or ``start``; None: nothing."""
        if self.preference is None:
            return None
        goes_on = any(getattr(self, name) is not None for name, _, _ in BEGINS_WITH.values())
        return self.preference.reference_of(is_base=self.tune != "full" and not goes_on)

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.distributed == "fsdp" or (
            self.deepspeed is not None and effective(self.deepspeed).stage == 3
        )

    @property
    def loads_sharded(self) -> bool:
        """Whether a process keeps its shards of the base only, unless the base turns out to hold codes.

        The whole base is needed to compute a prefix from a text, or codes from weights.
        """
        whole = self.prefix is not None and self.prefix.init == "text"
        return self.shards_weights and not (whole or self.from_scratch or self.model.makes_codes)

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
        for name, value in self._asked_codes.items():
            if value is not None:
                is_outer = name == "quantization_embeddings"
                self.check_division(f"`model.{name}` is `{value}`", has_outer_codes=is_outer)

    def check_division(self, what: str, *, has_outer_codes: bool) -> None:
        """Refuse to divide codes among processes where that cannot be.

        Args:
            what: says of which codes, for the message.
            has_outer_codes: embedding and head are codes, not the blocks alone.

        Raises:
            ConfigError: `distributed` or `deepspeed` would divide them.
        """
        if self.distributed == "fsdp":
            raise ConfigError(
                f"`distributed` is `fsdp`, but {what}, and codes are not divided. Leave one of them out: an "
                "INT4 base is small enough for every process."
            )
        # DeepSpeed (0.19) takes the type that it computes in from the first weight, which is the embedding.
        if has_outer_codes and self.shards_weights:
            raise ConfigError(
                f"`deepspeed` divides the weights (stage 3), but {what}, and DeepSpeed computes in the type "
                "of the first weight, which must not be codes. Use `deepspeed=zero2`: a base of codes is "
                "small enough for every process."
            )

    @property
    def _asked_codes(self) -> dict[str, str | None]:
        """Settings of the model that make codes, by name."""
        model = self.model
        return {"quantization": model.method, "quantization_embeddings": model.quantization_embeddings}
