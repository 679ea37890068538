"""Trains as the only process of a group, as `torchrun --nproc-per-node 1` starts it, and says how the group talks.

Words: a file for what is found, then overrides of `glmtune train`. A program of its own, since a process that has
used CUDA cannot be forked, and the group's environment must be there before torch is.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path


def main() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    import torch

    from glmtune.cli import main as glmtune

    code = glmtune(["train", *sys.argv[2:]])
    distributed = torch.distributed
    backend = distributed.get_backend()
    tensor = torch.ones(3, device="cuda" if backend == "nccl" else "cpu")
    distributed.all_reduce(tensor)
    found = {"backend": backend, "sum": tensor.tolist()}
    Path(sys.argv[1]).write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(main())
