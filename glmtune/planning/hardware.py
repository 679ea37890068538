"""The memory there is: written as `4x80GB`, or what this machine has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from glmtune.errors import ConfigError

GIB = 2**30
# Version 2 and version 1 of control groups: in a container the machine's memory is not the process's.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Devices of one kind.

    Attributes:
        device: ``cuda``, ``npu``, ``xpu`` or ``cpu``.
        num_nodes: machines.
        per_node: GPUs of a machine; 1 on a CPU (one process).
        device_bytes: memory of one GPU, or of the machine if it trains on its CPU.
        host_bytes: memory of one machine beside the GPUs; None: not said.
        source: ``given`` or ``detected``.
    """

    device: str
    num_nodes: int = 1
    per_node: int = 1
    device_bytes: int
    host_bytes: int | None = None
    source: str = "given"

    @property
    def num_devices(self) -> int:
        """GPUs in all; 1 on a CPU."""
        return self.num_nodes * self.per_node

    def __str__(self) -> str:
        """Word it.

        >>> str(parse_hardware("2x8x80GB+512GB"))
        '2 machines with 8 GPUs of 80.0 GiB and 512.0 GiB of host memory each (given)'
        """
        size = f"{self.device_bytes / GIB:.1f} GiB"
        if self.device == "cpu":
            return f"CPU, {size} of memory ({self.source})"
        nodes = "" if self.num_nodes == 1 else f"{self.num_nodes} machines with "
        gpus = f"{self.per_node} GPU{'s' if self.per_node > 1 else ''} of {size}"
        host = "" if self.host_bytes is None else f" and {self.host_bytes / GIB:.1f} GiB of host memory"
        # What is no CUDA GPU is counted like one: its libraries and kernels take what theirs take, or so.
        like = "" if self.device == "cuda" else f", {self.device.upper()}, estimated like a CUDA GPU"
        return f"{nodes}{gpus}{host}{' each' if self.num_nodes > 1 else ''} ({self.source}{like})"


def parse_hardware(text: str) -> Hardware:
    """Read a description of hardware.

    Args:
        text: ``[MACHINESx]GPUSxSIZE[+HOST]`` or ``cpu:SIZE``; sizes end in GB, which stands for 2**30 bytes,
            as on the boxes of cards.

    Raises:
        ConfigError: another form, or a size of nothing.

    >>> parse_hardware("4x80GB").num_devices, parse_hardware("cpu:24GB").device_bytes // GIB
    (4, 24)
    """
    squeezed = text.replace(" ", "")
    size = r"(\d+(?:\.\d+)?)Gi?B"
    on_cpu = re.fullmatch(rf"cpu:{size}", squeezed, re.IGNORECASE)
    if on_cpu and float(on_cpu[1]) > 0:
        return Hardware(device="cpu", device_bytes=int(float(on_cpu[1]) * GIB))
    gpus = re.fullmatch(rf"(?:(\d+)x)?(\d+)x{size}(?:\+{size})?", squeezed, re.IGNORECASE)
    if not gpus or not (int(gpus[1] or 1) and int(gpus[2]) and float(gpus[3])):
        raise ConfigError(
            f"`hardware` is `{text}`, but it must be GPUSxSIZE (`4x80GB`; with host memory `4x80GB+512GB`; "
            "two machines `2x8x80GB`) or cpu:SIZE (`cpu:24GB`), all of it above 0. Leave it out to take what "
            "this machine has."
        )
    return Hardware(
        device="cuda",
        num_nodes=int(gpus[1] or 1),
        per_node=int(gpus[2]),
        device_bytes=int(float(gpus[3]) * GIB),
        host_bytes=int(float(gpus[4]) * GIB) if gpus[4] else None,
    )


def detect_hardware(device: str = "auto") -> Hardware:
    """Ask this machine.

    Args:
        device: ``model.device``: a kind and a kind with its number choose, ``auto`` takes what training
            takes.

    Returns:
        The visible GPUs (the smallest one's memory; of NPUs and XPUs one, as no more train together), or the
        memory of the machine as far as a container's limit lets this process have it. MPS has no other
        memory, so there the machine stands for it.

    Raises:
        ConfigError: there is no such device.
    """
    from glmtune.memory import WITH_OWN_MEMORY, total_bytes
    from glmtune.models.devices import list_devices, training_device

    host, chosen = host_memory_bytes(), training_device(device)
    if chosen.type not in WITH_OWN_MEMORY:
        return Hardware(device="cpu", device_bytes=host, source="detected")
    there = [each for each in list_devices() if each.type == chosen.type]
    if chosen.index is not None:
        there = [chosen]
    elif chosen.type != "cuda":
        there = there[:1]
    return Hardware(
        device=chosen.type,
        per_node=len(there),
        device_bytes=min(map(total_bytes, there)),
        host_bytes=host,
        source="detected",
    )


def host_memory_bytes() -> int:
    """Return the memory of this machine, or the container's limit where that is less."""
    import psutil

    total = psutil.virtual_memory().total
    for name in CGROUP_LIMITS:
        try:
            limit = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total
