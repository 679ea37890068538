"""Weights, gradients and optimizer states: what is there between two steps.

Sources:
    Rajbhandari et al. 2019, arXiv:1910.02054, section 5: with P processes stage 1 of ZeRO leaves each of them
    1/P of the optimizer states, stage 2 also of the gradients, stage 3 also of the weights; section 3.1:
    Adam in mixed precision keeps 2 + 2 bytes per weight and gradient and 12 more (float32 weight, two
    moments). Kingma and Ba 2014, arXiv:1412.6980: two moments per number. Shazeer and Stern 2018,
    arXiv:1804.04235: row and column means instead of the second moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.planning.workload import Workload

OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2.04,
    "adamw_torch_8bit": 2.04,
    "paged_adamw_8bit": 2.04,
    "paged_adamw_32bit": 8.0,
    "adafactor": 0.02,
    "sgd": 0.0,
}
"""Bytes of state per trained number: two float32 moments; in 8 bits one byte each and a scale per block of
256; Adafactor's row and column means (below two hundredths for matrices of these sizes)."""


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of one process.

    Attributes:
        weights: on the device.
        gradients: on the device, of all trained numbers, once all are there.
        optimizer: on the device.
        host: in host memory, for one process.
    """

    weights: float
    gradients: float
    optimizer: float
    host: float


def num_trained(work: Workload) -> int:
    """Return how many numbers are trained.

    A prefix holds ``P x W`` numbers, W = L x 2 x K x H; re-parameterised it is an embedding ``[P, I]`` and
    two layers I -> D -> W, where I is W, or D in the first generation (`glmtune.prefix.encoder`); a gate adds
    a number per layer and query head. An adapter of rank r on a layer ``[O, I]`` holds r x (I + O).
    """
    geometry = work.geometry
    if work.is_full:
        return geometry.num_parameters
    if work.lora is not None:
        return geometry.num_layers * sum(
            work.lora.rank * (rows + columns) for rows, columns in work.lora_targets.values()
        )
    assert work.prefix is not None
    width = prefix_width(work)
    gates = geometry.num_layers * geometry.num_heads if work.prefix.gate else 0
    if not work.prefix.prefix_projection:
        return work.prefix_length * width + gates
    inner = geometry.hidden_size if geometry.is_first else width
    hidden = geometry.hidden_size
    return work.prefix_length * inner + (inner + 1) * hidden + (hidden + 1) * width + gates


def trained_bytes(work: Workload) -> int:
    """Return the bytes of a trained number on its device.

    Prefix and adapters are float32 whatever the base is; DeepSpeed casts everything to the type it computes
    in.
    """
    return work.weight_bytes if work.is_full or work.sharding.stage else 4


def prefix_width(work: Workload) -> int:
    """Return the numbers of one prefix position over all layers: L x 2 x K x H."""
    geometry = work.geometry
    return geometry.num_layers * 2 * geometry.num_kv_heads * geometry.head_dim


def base_bytes(work: Workload) -> float:
    """Return the bytes of the base model's weights, not sharded.

    Quantized: codes, scales and zero points in the linear layers of the blocks
    (`Method.bits_per_weight`), in embedding and head where these are, everything else in floating point.
    """
    geometry = work.geometry
    linear = geometry.block_linear_size * float(work.weight_bytes)
    if work.method is not None:
        shapes = geometry.linears.values()
        linear = sum(rows * columns * work.bits_per_weight(columns) / 8 for rows, columns in shapes)
    rest = geometry.num_parameters - geometry.num_layers * geometry.block_linear_size - geometry.outer_size
    outer = geometry.outer_size * work.outer_bytes_per_weight
    return geometry.num_layers * linear + outer + rest * work.weight_bytes


def states_of(work: Workload) -> States:
    """Return what a process holds between two steps, sharded and offloaded as the run asks.

    Without ZeRO a trained number takes its weight, a gradient and the optimizer's states. DeepSpeed trains
    16-bit weights beside float32 ones in the optimizer (in float32 runs, too, it keeps its own copy of the
    sharded part); gradients have the type of the weights.
    """
    sharding, trained = work.sharding, num_trained(work)
    per_number = OPTIMIZER_BYTES[work.optim]
    own = trained_bytes(work)
    base = base_bytes(work)
    weights = base if work.is_full else base + trained * own
    share = 1 / sharding.num_processes
    if sharding.fsdp:
        return States(weights * share, trained * own * share, trained * per_number * share, 0.0)
    if sharding.stage == 0:
        return States(weights, trained * own, trained * per_number, 0.0)
    master = trained * (4 + per_number) * share
    gradients = trained * own * (share if sharding.stage >= 2 else 1)
    sharded = weights * (share if sharding.stage == 3 else 1)
    host = master if sharding.offload_optimizer else 0.0
    host += gradients if sharding.offload_optimizer and sharding.stage >= 2 else 0.0
    host += sharded if sharding.offload_param else 0.0
    return States(
        weights=0.0 if sharding.offload_param else sharded,
        gradients=0.0 if sharding.offload_optimizer and sharding.stage >= 2 else gradients,
        optimizer=0.0 if sharding.offload_optimizer else master,
        host=host,
    )
