"""Memory at every moment of a run that can be its largest, by part; the largest one is the estimate.

A run holds weights and optimizer states all the time. Activations grow through the forward pass and shrink
through the backward pass, while gradients do the opposite, so the peak is at one end of the backward pass:
at its beginning (head, or topmost block), or at its end (lowest block, embedding); or in the optimizer's
step; or while an evaluation or a save needs memory of its own. What lies between two of these moments is
linear in the block's number and cannot be larger than both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from glmtune.planning import activations as kept
from glmtune.planning.hardware import GIB
from glmtune.planning.states import OPTIMIZER_BYTES, base_bytes, num_trained, states_of, trained_bytes
from glmtune.planning.workload import Workload

SHARD_BYTES = 2 * GIB
"""Tensors of one file of a full checkpoint are copied before they are written."""
CPU_LIBRARIES = 0.75 * GIB
"""Python, torch, transformers and the rest, resident in a process that trains on a CPU (measured)."""
CPU_SLACK = 0.08
"""Share of what comes and goes that the C allocator holds beyond it (measured)."""
CPU_FRAGMENTS = 0.5
"""Share of freed activations that gradients, which come in their place, cannot use (measured)."""
CPU_STRANDED = 0.5
"""Share of what an MLP keeps that each block leaves in holes of the C allocator (measured): where it is
checkpointed, or its weights are formed from codes, much comes and goes between what stays."""
GPU_CONTEXT = 0.6 * GIB
"""CUDA context, loaded kernels and cuBLAS workspace of a process (typical of an H100 with CUDA 12;
assumed)."""
GPU_SLACK = 0.03
"""Share of a GPU's allocations lost in torch's blocks (assumed)."""
GPU_HOST_LIBRARIES = 2.5 * GIB
"""Host memory of a process that trains on a GPU: libraries and pinned buffers (assumed)."""
ZERO3_LIVE = 1_000_000_000
"""Gathered numbers that DeepSpeed keeps for their next use before it releases any (its default of
``stage3_max_live_parameters``)."""
NCCL_BUFFERS = 0.4 * GIB
"""Communication buffers of a process among several (assumed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by part.

    Attributes:
        weights: of the base and of what is added to it.
        gradients: of trained numbers.
        optimizer: states, and the float32 weights of ZeRO.
        activations: kept for the backward pass, and of the block at work.
        logits: of the labels at work, their loss and gradient.
        buffers: 16-bit copies of weights, buckets, weights gathered or formed from codes, temporaries.
        snapshot: the copy from which a checkpoint is written beside training, and what writing needs.
        overhead: libraries, context, and what allocators hold beyond.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    snapshot: float = 0.0
    overhead: float = 0.0

    @property
    def passing(self) -> float:
        """What is allocated anew in every pass."""
        return self.activations + self.logits + self.buffers

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs.

    Attributes:
        device: of one GPU (or of the process, on a CPU) at its largest moment.
        moment: which that is.
        host_bytes: of one machine beside its GPUs; on a CPU 0, as it is in ``device``.
        moments: total of every moment looked at.
    """

    device: Memory
    moment: str
    host_bytes: float
    moments: dict[str, float]


def estimate(work: Workload) -> Estimate:
    """Reckon the memory of a run.

    Args:
        work: what one of its processes computes.
    """
    moments = _moments(work)
    highest = max(memory.passing for memory in moments.values())
    memories = {name: _with_overhead(work, memory, highest) for name, memory in moments.items()}
    moment = max(memories, key=lambda name: memories[name].total)
    totals = {name: memory.total for name, memory in memories.items()}
    return Estimate(memories[moment], moment, _host_bytes(work), totals)


def _moments(work: Workload) -> dict[str, Memory]:
    held = _held(work)
    late = _gradients(work)[1]
    decoded = max(kept.decoded_bytes(work), kept.decoded_head_bytes(work, is_training=False))
    evaluation, eval_logits = kept.evaluation_bytes(work)
    return {
        **_pass_moments(work),
        **_replay_moments(work),
        "optimizer step": dataclasses.replace(held, gradients=late, buffers=_step_bytes(work)),
        "evaluation": dataclasses.replace(held, activations=evaluation, logits=eval_logits, buffers=decoded),
        "saving": dataclasses.replace(held, buffers=_saving_bytes(work)),
        "loading": Memory(weights=_loading_bytes(work)),
    }


def _held(work: Workload) -> Memory:
    states = states_of(work)
    return Memory(weights=states.weights, optimizer=states.optimizer, snapshot=_snapshot_bytes(work))


def _replay_moments(work: Workload) -> dict[str, Memory]:
    """Return the moments of a pass of general rows, beside what the task's pass before it has kept.

    Both are summed before the backward pass, which goes back through the later one first: of the task's pass
    everything is there until that is done. With ``kl`` the base's logits stand beside those of the model.
    """
    if work.replay is None:
        return {}
    other = dataclasses.replace(work, batch=work.replay, replay=None)
    kept_logits = kept.logits_bytes(work) / 3  # the log-softmax
    of_base = kept.logits_bytes(other) * work.replays_kl
    return {
        f"replay, {name}": dataclasses.replace(
            memory,
            activations=memory.activations
            + _kept_blocks(work)
            + kept.prefix_bytes(work)
            + kept.head_bytes(work),
            logits=memory.logits + kept_logits + (of_base if name in ("loss", "head") else 0.0),
        )
        for name, memory in _pass_moments(other).items()
    }


def _kept_blocks(work: Workload) -> float:
    """Return what all blocks keep for the backward pass."""
    blocks = work.geometry.num_layers
    if work.checkpointing:
        return blocks * kept.checkpoint_bytes(work) + kept.prefix_states_bytes(work)
    mixture = work.geometry.mixture
    dense = 0 if mixture is None else max(0, mixture.num_dense - 1)
    upper = (blocks - 1 - dense) * kept.block_bytes(work) + dense * kept.block_bytes(work, is_dense=True)
    return kept.block_bytes(work, is_lowest=True) + upper


def _pass_moments(work: Workload) -> dict[str, Memory]:
    """Return the moments of one forward and backward pass."""
    states, held = states_of(work), _held(work)
    early, late = _gradients(work)
    earlier = states.gradients if work.batch.accumulation > 1 or not work.is_full else 0.0
    lowest, block = kept.block_bytes(work, is_lowest=True), kept.block_bytes(work)
    outer, all_blocks = kept.prefix_bytes(work), _kept_blocks(work)
    if work.checkpointing:
        entered, prefix = kept.checkpoint_bytes(work), kept.prefix_states_bytes(work)
        shared = entered if work.residual_bytes == 4 else 0.0  # the first norm keeps the block's input itself
        top, bottom = all_blocks + block - shared, entered + prefix + lowest - shared
    else:
        top, bottom = all_blocks, lowest
    inside, buffers = kept.block_moment_bytes(work), _buffers(work)
    casts, decoded = _cast_bytes(work), kept.decoded_bytes(work)
    kept_casts = casts if not work.checkpointing else 0.0  # autocast forgets them after the forward pass
    loss = all_blocks + outer + kept.head_bytes(work)
    return {
        "loss": dataclasses.replace(
            held,
            gradients=earlier,
            activations=loss,
            logits=2 / 3 * kept.logits_bytes(work),
            buffers=buffers + casts,
        ),
        "head": dataclasses.replace(
            held,
            gradients=early,
            activations=loss,
            logits=kept.logits_bytes(work),
            buffers=buffers + kept_casts + kept.decoded_head_bytes(work),
        ),
        "topmost block": dataclasses.replace(
            held, gradients=early, activations=top + outer + inside, buffers=buffers + kept_casts + decoded
        ),
        "lowest block": dataclasses.replace(
            held, gradients=late, activations=bottom + outer + inside, buffers=buffers + decoded
        ),
    }


def _gradients(work: Workload) -> tuple[float, float]:
    """Return the gradients there are when the backward pass begins and when it ends.

    With accumulation those of the earlier passes are there from the start, and the new one of the matrix at
    work stands beside them. ZeRO 2 and 3 keep their share only, the rest being in the bucket.
    """
    states, geometry = states_of(work), work.geometry
    if not work.is_full:
        return states.gradients, states.gradients
    widest = max(rows * columns for rows, columns in geometry.linears.values())
    own = work.weight_bytes
    head = geometry.embedding_size * own
    if work.sharding.stage >= 2 or work.sharding.fsdp:
        return states.gradients + head, states.gradients + widest * own
    if work.batch.accumulation > 1:
        return states.gradients + head, states.gradients + head
    block = (geometry.block_linear_size + geometry.block_other_size) * own
    return head + block, states.gradients


def _cast_bytes(work: Workload) -> float:
    """Return the 16-bit copies of float32 weights that autocast makes in a forward pass."""
    if not work.autocast:
        return 0.0
    geometry = work.geometry
    linear = geometry.num_layers * geometry.block_linear_size if work.method is None else 0
    if geometry.mixture is not None:  # experts compute in their own type
        dense, size = geometry.mixture.num_dense, 3 * geometry.hidden_size
        linear += size * geometry.mlp_size * dense
        linear += size * geometry.mixture.shared_size * (geometry.num_layers - dense)
    return 2.0 * (linear + (geometry.embedding_size if work.embeddings is None else 0))


def _buffers(work: Workload) -> float:
    """Return what communication keeps on a device through forward and backward pass.

    DistributedDataParallel copies gradients into buckets of the same size in all. ZeRO sends buckets, two
    at a time; stage 3 gathers the weights of the layers at work and ahead, the widest module and one
    bucket, and keeps gathered ones for their next use.
    """
    sharding = work.sharding
    if sharding.num_processes == 1 and sharding.stage == 0:
        return 0.0
    own, geometry = trained_bytes(work), work.geometry
    block = geometry.block_size
    if sharding.fsdp:
        outer = geometry.outer_size + geometry.final_norm_size
        return float((outer + 2 * block) * work.weight_bytes + block * own * work.is_full)
    if sharding.stage == 0:
        return num_trained(work) * own
    trained = num_trained(work)
    buckets = 2.0 * own * min(sharding.bucket_size, trained)
    if sharding.stage == 3:
        widest = max(geometry.embedding_size, geometry.block_linear_size + geometry.experts_size)
        live = min(ZERO3_LIVE, geometry.num_parameters)
        buckets += max(widest + sharding.bucket_size // 10, live) * work.weight_bytes
    return buckets


def _step_bytes(work: Workload) -> float:
    """Return what the optimizer's step needs for a moment.

    On a GPU torch's AdamW forms the root of all second moments at once, fused AdamW nothing; on a CPU it
    forms two tensors for one parameter after the other.
    """
    if work.optim in ("adamw_torch_fused", "sgd"):
        return 0.0
    sharding, trained = work.sharding, num_trained(work)
    if sharding.stage and sharding.offload_optimizer:
        return 0.0
    if work.device != "cpu":
        return 4.0 * trained / (sharding.num_processes if sharding.stage or sharding.fsdp else 1)
    return 2 * 4.0 * _widest_trained(work)


def _widest_trained(work: Workload) -> int:
    geometry = work.geometry
    if work.is_full:
        return max(geometry.embedding_size, *(rows * columns for rows, columns in geometry.linears.values()))
    if work.lora is not None:
        return max(work.lora.rank * max(shape) for shape in work.lora_targets.values())
    return num_trained(work)


def _saving_bytes(work: Workload) -> float:
    """Return the copies made while a checkpoint is written, where they are made on the device."""
    if work.device != "cpu":
        return 0.0
    written = base_bytes(work) if work.is_full else num_trained(work) * 4.0
    return min(written, SHARD_BYTES)


def _snapshot_bytes(work: Workload) -> float:
    """Return the copy that a checkpoint is written from beside training, where that lies beside the weights.

    Under ZeRO every process copies its share: float32 weights and states.
    """
    if work.device != "cpu" or not work.saves_asynchronously:
        return 0.0
    return copied_bytes(work) + _saving_bytes(work)


def copied_bytes(work: Workload) -> float:
    """Return what process 0 copies of weights and states to write a checkpoint of them."""
    sharding, trained = work.sharding, num_trained(work)
    own = 4 if sharding.stage else trained_bytes(work)
    share = 1 / sharding.num_processes if sharding.stage else 1.0
    return trained * (own + OPTIMIZER_BYTES[work.optim]) * share


def _loading_bytes(work: Workload) -> float:
    """Return what a process holds while the base is read, where it trains.

    Read in parts: its share, and one tensor, of which embedding and head are the largest.
    """
    if work.embeddings is not None and work.method is None:  # rounded when all of it is there
        plain = dataclasses.replace(work, embeddings=None)
        return base_bytes(plain) + work.geometry.embedding_size * work.outer_bytes_per_weight
    if not work.loads_in_parts:
        return base_bytes(work) if work.device == "cpu" else 0.0
    share = base_bytes(work) / work.sharding.num_processes
    return share + work.geometry.embedding_size * work.weight_bytes


def _with_overhead(work: Workload, memory: Memory, highest: float) -> Memory:
    """Add what is held beyond the tensors; ``highest`` is what passed at the fullest moment."""
    if work.device == "cpu":
        slack = CPU_SLACK * (memory.passing + memory.gradients) + CPU_FRAGMENTS * (highest - memory.passing)
        if work.checkpointing or work.has_codes:
            slack += CPU_STRANDED * work.geometry.num_layers * kept.mlp_bytes(work)
        return dataclasses.replace(memory, overhead=CPU_LIBRARIES + slack)
    talks = NCCL_BUFFERS if work.sharding.num_processes > 1 else 0.0
    return dataclasses.replace(memory, overhead=GPU_CONTEXT + talks + GPU_SLACK * memory.total)


def _host_bytes(work: Workload) -> float:
    """Return the host memory of one machine that trains on GPUs.

    Every process has its libraries and what ZeRO offloads; before that, unless it reads in parts, DeepSpeed's
    weights. Process 0 copies a file of the checkpoint at a time, and reads a tensor at a time for its
    fingerprint; what checkpoints are written from beside training lies there, too.
    """
    if work.device == "cpu":
        return 0.0
    states, sharding = states_of(work), work.sharding
    written = base_bytes(work) if work.is_full else num_trained(work) * 4.0
    per_process, first = states.host, min(written, SHARD_BYTES)
    if work.loads_in_parts:
        first = max(first, 4.0 * work.geometry.embedding_size)
    elif sharding.stage:
        whole = 4.0 * work.geometry.num_parameters if work.is_full else base_bytes(work)
        per_process = max(per_process, whole)
    if work.saves_asynchronously or sharding.fsdp:  # FSDP's process 0 gathers everything in any case
        first += copied_bytes(work) * (sharding.per_node if sharding.stage else 1)
    return sharding.per_node * (GPU_HOST_LIBRARIES + per_process) + first
