"""What one process of a run computes: everything that its memory depends on, read from the run's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glmtune.errors import ConfigError
from glmtune.models.releases.families import why_not_tuned
from glmtune.planning.geometry import Geometry
from glmtune.planning.hardware import Hardware
from glmtune.preference.settings import BASE
from glmtune.prefix.settings import PrefixSettings
from glmtune.quantization.arithmetic.methods import EXTERNAL, METHODS, OPTIONAL
from glmtune.retention.settings import rows_per_pass
from glmtune.training.config import RunConfig
from glmtune.training.distributed.deepspeed_settings import effective
from glmtune.training.distributed.launch import LaunchSettings
from glmtune.training.settings import LoraSettings

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
REPLAYED_PROMPT = 128
"""Tokens reckoned for a general prompt; the shipped ones are shorter."""
SMALL_MODEL = 1_000_000_000
"""Below so many parameters float16 checkpoints run in float32 on a CPU (`glmtune.models.load`)."""
LINEARS_OF_LORA = ("query_key_value", "q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_b_proj")
"""What LoRA adapts unless told otherwise (`glmtune.training.adapt`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One forward pass of one process, at its longest.

    Attributes:
        rows: B.
        length: S, tokens of the longest row.
        num_labels: T, tokens of all rows that carry loss.
        accumulation: passes per optimizer step.
        eval_rows: rows of the largest forward pass without gradients, those of the evaluation or of a
            reference; 0 without any.
        is_padded: rows differ in length, so attention gets a mask.
    """

    rows: int
    length: int
    num_labels: int
    accumulation: int = 1
    eval_rows: int = 0
    is_padded: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of a forward pass, padding included."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How processes share the work.

    Attributes:
        num_processes: in all, one per GPU.
        per_node: processes on one machine.
        stage: of ZeRO; 0: every process holds everything.
        offload_optimizer: optimizer states and float32 weights wait in host memory.
        offload_param: sharded weights wait there, too (stage 3).
        bucket_size: numbers sent at a time.
        fsdp: FSDP2 divides weights, gradients and states, and gathers weights layer by layer.
    """

    num_processes: int = 1
    per_node: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket_size: int = 200_000_000
    fsdp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Everything that decides memory.

    Attributes:
        geometry: of the model.
        device: ``cpu`` or the kind of GPU.
        weight_bytes: of one floating point weight as it is held while training.
        autocast: matrix products run in 16 bits over float32 weights.
        tune: ``full``, ``prefix`` or ``lora``.
        prefix: with ``prefix``.
        lora: with ``lora``.
        method: how the base is quantized, None: not at all.
        embeddings: how embedding and head are, None: not at all.
        batch: the longest one.
        sharding: among processes.
        checkpointing: activations inside blocks are computed again instead of kept.
        optim: name of the optimizer.
        replay: general rows beside a batch; its ``accumulation`` is the number of batches that have some.
        replays_kl: they are compared with the base's probabilities, of a forward pass more.
        forward_passes: without gradients beside each pass of a batch, in passes as large as that one.
        loads_in_parts: a process reads its part of the base only, one tensor after the other.
        saves_asynchronously: checkpoints are written beside training, from a copy.
        attention: ``sdpa`` (fused) or ``eager``.
    """

    geometry: Geometry
    device: str
    weight_bytes: int
    autocast: bool
    tune: str
    prefix: PrefixSettings | None
    lora: LoraSettings | None
    method: str | None
    batch: Batch
    sharding: Sharding
    checkpointing: bool
    optim: str
    replay: Batch | None = None
    replays_kl: bool = False
    forward_passes: int = 0
    loads_in_parts: bool = False
    saves_asynchronously: bool = False
    attention: str = "sdpa"
    embeddings: str | None = None

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained."""
        return self.tune == "full"

    @property
    def passes_per_step(self) -> float:
        """Passes of an optimizer step in passes of a task batch; those with general rows by their tokens."""
        # A backward pass takes twice the time of a forward pass, so one forward pass more is a third more.
        passes = self.batch.accumulation * (1 + self.forward_passes / 3)
        if self.replay is None:
            return passes
        share = self.replay.num_tokens / self.batch.num_tokens * (4 / 3 if self.replays_kl else 1)
        return passes + self.replay.accumulation * share

    @property
    def compute_bytes(self) -> int:
        """Of a number that comes out of a matrix product."""
        return 2 if self.autocast else self.weight_bytes

    @property
    def residual_bytes(self) -> int:
        """Of a number of the residual stream: the embedding's type, which autocast leaves."""
        return self.weight_bytes

    @property
    def is_gated(self) -> bool:
        """Whether what is trained is a prefix with a softmax of its own."""
        return self.prefix is not None and self.prefix.gate

    @property
    def prefix_length(self) -> int:
        """P, positions in front of every layer's keys; 0 without a prefix."""
        return self.prefix.pre_seq_len if self.prefix is not None else 0

    @property
    def bits(self) -> int | None:
        """Of a code of the base, None for floating point weights."""
        return None if self.method is None else {**METHODS, **OPTIONAL, **EXTERNAL}[self.method].bits

    def bits_per_weight(self, columns: int) -> float:
        """Return the bits of a quantized weight, scales and zero points included.

        Args:
            columns: of its matrix.
        """
        assert self.method is not None
        if self.method in EXTERNAL:
            return EXTERNAL[self.method].bits_per_weight
        return {**METHODS, **OPTIONAL}[self.method].bits_per_weight(columns)

    @property
    def outer_bytes_per_weight(self) -> float:
        """Bytes of a number of embedding and head, scales included."""
        if self.embeddings is None:
            return float(self.weight_bytes)
        return {**METHODS, **OPTIONAL}[self.embeddings].bits_per_weight(self.geometry.hidden_size) / 8

    @property
    def has_codes(self) -> bool:
        """Whether anything of the base is codes."""
        return self.method is not None or self.embeddings is not None

    @property
    def lora_targets(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of every adapted layer of a block, by name."""
        if self.lora is None:
            return {}
        names = self.lora.targets or LINEARS_OF_LORA
        return {name: shape for name, shape in self.geometry.linears.items() if name in names}


def workload_of(
    config: RunConfig, geometry: Geometry, hardware: Hardware, *, length: int | None = None
) -> Workload:
    """Read what a run computes from the settings that `glmtune train` would obey.

    Args:
        config: of the run.
        geometry: of its model.
        hardware: where it would run.
        length: tokens of the longest row; None: the longest that the data settings allow.

    Raises:
        ConfigError: stored codes cannot be trained in full or are of another method than asked for; a layer
            for LoRA does not exist.
    """
    method = config.model.method or geometry.quantization
    _check(config, geometry)
    weight_bytes = _weight_bytes(config, geometry, hardware)
    sharding = _sharding(config, geometry, hardware)
    return Workload(
        geometry=geometry,
        device=hardware.device,
        weight_bytes=weight_bytes,
        autocast=_autocasts(config, hardware, weight_bytes),
        tune=config.tune,
        prefix=config.prefix,
        lora=config.lora,
        method=method,
        batch=batch_of(config, length),
        replay=_replay(config, sharding.num_processes),
        replays_kl=config.retain is not None and config.retain.loss == "kl",
        forward_passes=_forward_passes(config),
        sharding=sharding,
        checkpointing=config.trainer.gradient_checkpointing,
        optim=config.trainer.optim,
        loads_in_parts=config.loads_sharded and method is None,
        saves_asynchronously=config.trainer.async_save,
        embeddings=config.model.quantization_embeddings or geometry.embeddings,
    )


def batch_of(config: RunConfig, length: int | None = None) -> Batch:
    """Return the longest batch that a run's settings allow.

    Args:
        config: of the run.
        length: tokens of the longest row, instead of what ``data`` allows; its answer is as long as that
            can be.
    """
    data, trainer = config.data, config.trainer
    assert data.max_source_length is not None  # see `with_lengths`
    assert data.max_target_length is not None
    longest = data.packing_length if data.packing else data.max_source_length + data.max_target_length + 1
    # A pack is never longer than its setting; without packs a measured length is taken as it is, since the
    # data may be shorter than the settings allow.
    length = min(length, longest) if length and data.packing else length or longest
    length = -(-length // data.pad_to_multiple_of) * data.pad_to_multiple_of
    # Logits are formed where there is a label: of every answer token and the id that ends it, never of the
    # first token of a row, which nothing predicts.
    answer = min(length - 1, data.max_target_length + 1)
    labels = answer if data.loss_on == "answer" and not data.packing else length - 1
    rows = trainer.per_device_train_batch_size
    eval_rows = trainer.per_device_eval_batch_size if data.has_validation else 0
    if config.preference is not None:  # two answers to each example, see `glmtune.preference.rows`
        eval_rows = 2 * max(eval_rows, rows if _forward_passes(config) else 0)
        rows *= 1 + config.preference.takes_pairs
    return Batch(
        rows=rows,
        length=length,
        num_labels=rows * labels,
        accumulation=trainer.gradient_accumulation_steps,
        eval_rows=eval_rows,
        is_padded=rows > 1 or data.packing or data.pad_to_multiple_of > 1,
    )


def _forward_passes(config: RunConfig) -> int:
    """Follow `glmtune.training.preference.trainer`: a reference not kept, and KTO's mismatched rows."""
    preference = config.preference
    if preference is None:
        return 0
    is_live = config.reference == BASE
    return int(is_live) if preference.takes_pairs else 1 + 2 * is_live


def _replay(config: RunConfig, num_processes: int) -> Batch | None:
    """Follow `glmtune.retention.replay`: general rows in as many batches as they can be spread over."""
    if config.retain is None:
        return None
    accumulation = config.trainer.gradient_accumulation_steps
    rows = config.retain.rows_of(config.trainer.per_device_train_batch_size * accumulation * num_processes)
    each = rows_per_pass(rows, accumulation=accumulation, num_processes=num_processes)
    return Batch(
        rows=each,
        length=REPLAYED_PROMPT + config.retain.max_new_tokens,
        num_labels=each * config.retain.max_new_tokens,
        accumulation=-(-rows // (each * num_processes)),
        is_padded=True,
    )


def _weight_bytes(config: RunConfig, geometry: Geometry, hardware: Hardware) -> int:
    """Follow `glmtune.models.load.choose_dtype`, and `tune_all`, which trains in float32."""
    if config.tune == "full" and config.deepspeed is None:
        return 4
    # Full tuning without DeepSpeed was answered above (`tune_all` casts to float32); DeepSpeed's engine holds
    # the type it computes in and keeps float32 weights among the optimizer's states.
    dtype = config.model.dtype if config.model.dtype != "auto" else geometry.dtype
    if config.tune == "full":
        return 4 if _precision(config, hardware) == "fp32" else 2
    is_small = geometry.num_parameters < SMALL_MODEL
    if config.model.dtype == "auto" and hardware.device == "cpu" and dtype == "float16" and is_small:
        return 4
    return DTYPE_BYTES[dtype]


def _precision(config: RunConfig, hardware: Hardware) -> str:
    """Follow `glmtune.training.arguments.compute_precision`: ``auto`` is bf16 for full tuning on a GPU."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    return "bf16" if config.tune == "full" and hardware.device != "cpu" else "fp32"


def _autocasts(config: RunConfig, hardware: Hardware, weight_bytes: int) -> bool:
    return weight_bytes == 4 and _precision(config, hardware) != "fp32"


def _sharding(config: RunConfig, geometry: Geometry, hardware: Hardware) -> Sharding:
    """Follow `glmtune.training.distributed.launch`: as many processes as set, else one per GPU."""
    launch, settings = config.launch, config.deepspeed
    per_node = launch.num_processes or (hardware.per_node if hardware.device != "cpu" else 1)
    if hardware.device != "cpu" and per_node > hardware.per_node:
        raise ConfigError(
            f"`launch.num_processes` is {per_node}, but a machine has {hardware.per_node} GPUs: every "
            "process needs one of its own. Lower it, or leave it out."
        )
    processes = per_node * (_machines(launch) if hardware.source == "detected" else hardware.num_nodes)
    if settings is None:
        return Sharding(num_processes=processes, per_node=per_node, fsdp=config.distributed == "fsdp")
    # What DeepSpeed will be given: a `deepspeed.json` may say otherwise than our settings.
    settings = effective(settings, hidden_size=geometry.hidden_size)
    return Sharding(
        num_processes=processes,
        per_node=per_node,
        stage=settings.stage,
        offload_optimizer=settings.offload_optimizer,
        offload_param=settings.offload_param,
        bucket_size=settings.bucket_size,
    )


def _machines(launch: LaunchSettings) -> int:
    """Return how many machines a run is started on: as set, or as many as the hostfile has lines."""
    if launch.hostfile is None:
        return launch.num_nodes
    try:
        lines = Path(launch.hostfile).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError:
        return 1  # the launcher says what is wrong with it
    return max(1, sum(1 for line in lines if line.partition("#")[0].strip()))


def _check(config: RunConfig, geometry: Geometry) -> None:
    asked, stored = config.model.method, geometry.quantization
    rounds = config.model.quantization_embeddings
    if geometry.mixture is not None:
        _check_mixture(config, geometry)
    if config.tune == "full" and stored is not None:
        raise ConfigError(
            f"`tune` is `full`, but `{geometry.name}` is quantized ({stored}): codes cannot be trained. "
            "Tune a prefix or LoRA (`+recipe=ptuning`, `+recipe=lora`), or name the unquantized release."
        )
    if asked is not None and stored is not None and asked != stored:
        raise ConfigError(
            f"`quantization` is `{asked}`, but `{geometry.name}` is stored as `{stored}`. Leave "
            "`quantization` out, or name the unquantized release."
        )
    if stored is not None:
        what = f"`{geometry.name}` is quantized ({stored})"
        config.check_division(what, has_outer_codes=geometry.embeddings is not None)
    if rounds is not None and geometry.embeddings not in (None, rounds):
        raise ConfigError(
            f"`quantization_embeddings` is `{rounds}`, but embedding and head of `{geometry.name}` are "
            f"stored as `{geometry.embeddings}`. Leave it out."
        )
    for name in (config.lora.targets or ()) if config.lora is not None else ():
        if name not in geometry.linears:
            raise ConfigError(
                f"`lora.targets` names `{name}`, but the blocks of `{geometry.name}` have the linear layers "
                f"{', '.join(geometry.linears)}."
            )


def _check_mixture(config: RunConfig, geometry: Geometry) -> None:
    kind = "glm4_moe" if geometry.latent is None else "glm4_moe_lite"
    if config.tune != "lora":
        raise ConfigError(why_not_tuned(kind, config.tune))
    if config.model.method is not None:
        raise ConfigError(
            f"`quantization` is `{config.model.method}`, but `{geometry.name}` is a mixture of experts "
            f"({kind}), which glmtune has no codes for. Leave it out."
        )
    if config.shards_weights:
        raise ConfigError(
            f"`deepspeed` (stage 3) or `distributed=fsdp` divides the weights among processes, but "
            f"`{geometry.name}` is a mixture of experts ({kind}), which every process holds as a whole. Use "
            "`deepspeed=zero2`, or leave both out."
        )
