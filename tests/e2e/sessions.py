"""Run sessions of several processes after importing everything once: each process is a fork of this one.

Reads names of plans (JSON), given as words or line by line on its input, writes what came of each beside it,
and says so. A session is `overrides` of `glmtune train`, or the rows of an oracle (`golden`), how many
processes (`count`), whether they may compute in fp16 (`half`), and what befalls one of them, or all (`fate`,
`rank`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any


def kill(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_step(step: int) -> None:
    """Die between the forward pass and the update of a step."""
    from glmtune.training.trainer import GlmTrainer

    loss = GlmTrainer.compute_loss

    def deadly(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = loss(self, *args, **kwargs)
        if self.state.global_step == step - 1:
            kill()
        return result

    GlmTrainer.compute_loss = deadly  # type: ignore[method-assign]


def killed_while_saving(step: int) -> None:
    """Die when this process has written its part of a step's checkpoint, in whatever thread."""
    from glmtune.training.distributed.zero_state import StateShare

    write = StateShare.write

    def deadly(self: Any, folder: Path) -> None:
        write(self, folder)
        if folder.name == f".checkpoint-{step}.partial":
            kill()

    StateShare.write = deadly  # type: ignore[method-assign]


def told_to_stop(step: int) -> None:
    from glmtune.training.trainer import GlmTrainer

    loss = GlmTrainer.compute_loss

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **kwargs)

    GlmTrainer.compute_loss = stopping  # type: ignore[method-assign]


def full_disk(step: int) -> None:
    """Let this process write small files only, from a step on."""
    import resource

    from glmtune.training.trainer import GlmTrainer

    save = GlmTrainer._save_checkpoint

    def save_without_space(self: Any, *args: Any) -> None:
        if self.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(self, *args)

    GlmTrainer._save_checkpoint = save_without_space  # type: ignore[method-assign]


def no_data(step: int) -> None:
    """Hide the training file from this process."""
    from glmtune.data import dataset

    load = dataset.load_split

    def blind(data: Any, *args: Any, **kwargs: Any) -> Any:
        import dataclasses

        return load(dataclasses.replace(data, train_file="/nowhere/train.json"), *args, **kwargs)

    dataset.load_split = blind


def little_memory(step: int) -> None:
    """Leave this process room for a few more MiB only, from a step on."""
    import resource

    from glmtune.training.trainer import GlmTrainer

    loss = GlmTrainer.compute_loss

    def cramped(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + 2**20, held + 2**20))
            inputs = {name: value.repeat(4000, 1) for name, value in inputs.items()}
        return loss(self, model, inputs, *args, **kwargs)

    GlmTrainer.compute_loss = cramped  # type: ignore[method-assign]


def not_finite(step: int) -> None:
    """Make the loss of this process NaN in one step, once."""
    from glmtune.training.trainer import GlmTrainer

    loss = GlmTrainer.compute_loss
    done: list[int] = []

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step != step - 1 or done:
            return loss(self, *args, **kwargs)
        done.append(step)
        return loss(self, *args, **kwargs) * float("nan")

    GlmTrainer.compute_loss = spoilt  # type: ignore[method-assign]


def reads_all(step: int) -> None:
    """Let this process hold the whole base before it is divided, as processes without a division do."""
    from glmtune.training.config import RunConfig

    RunConfig.loads_sharded = property(lambda self: False)  # type: ignore[assignment,method-assign]


def bad_gradient(step: int) -> None:
    """Make a gradient of this process infinite from a step on, while the loss stays as it is."""
    from glmtune.training.trainer import GlmTrainer

    loss = GlmTrainer.compute_loss

    def steep(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = loss(self, *args, **kwargs)
        if self.state.global_step >= step - 1:
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    GlmTrainer.compute_loss = steep  # type: ignore[method-assign]


def keeps_gradient(step: int) -> None:
    """Keep trained weights and their gradient as they are just before the update of a step."""
    import torch

    from glmtune.training.trainer import GlmTrainer

    norm = GlmTrainer._get_grad_norm

    def whole(tensor: Any) -> Any:
        return getattr(tensor, "full_tensor", tensor.detach)().detach().clone()

    def keeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = norm(self, *args, **kwargs)
        if self.state.global_step == step - 1:
            named = [(name, each) for name, each in self.tuned.model.named_parameters() if each.requires_grad]
            kept = {name: (whole(weight), whole(weight.grad)) for name, weight in named}
            torch.save(kept, self.run_folder / f"gradient-{self.args.process_index}.pt")
        return result

    GlmTrainer._get_grad_norm = keeping  # type: ignore[method-assign]


def half_on_cpu() -> None:
    """Let fp16 run here, which only GPUs do fast, with the loss scale of DeepSpeed."""
    from deepspeed.accelerator import get_accelerator

    from glmtune.training import arguments

    type(get_accelerator()).is_fp16_supported = lambda self: True
    decide = arguments.compute_precision
    arguments.compute_precision = lambda *args, **values: decide(*args, **{**values, "device": "cuda"})


FATES = {
    fate.__name__: fate
    for fate in (
        killed_in_step,
        killed_while_saving,
        told_to_stop,
        full_disk,
        no_data,
        little_memory,
        not_finite,
        reads_all,
        bad_gradient,
        keeps_gradient,
    )
}


def process(session: dict[str, Any], folder: Path, rank: int, port: int) -> int:
    """Be one process of a session, whose logs and runs go to a folder."""
    os.chdir(folder)
    count = session["count"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(f"{session['name']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from glmtune.cli import main

    if session.get("half"):
        half_on_cpu()
    if session.get("fate") and session.get("rank", 1) in (rank, "all"):
        FATES[session["fate"]](session.get("step", 0))
    try:
        if "golden" in session:
            from tests.e2e.golden_rows import train

            oracle, source, stage = session["golden"]
            return train(Path(oracle), Path(source), stage, folder / session["name"])
        return main(["train", *session["overrides"]])
    except Exception:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(session: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a session to its end: exit codes by rank, and seconds."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    start = time.monotonic()
    pids = []
    for rank in range(session["count"]):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = process(session, folder, rank, port)
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return {"codes": codes, "seconds": round(time.monotonic() - start, 2)}


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    with suppress(ImportError):  # FSDP needs none
        import deepspeed  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    from glmtune.training import session, trainer  # noqa: F401
    from glmtune.training.distributed import deepspeed_engine  # noqa: F401

    for line in sys.argv[1:] or sys.stdin:
        folder = Path(line.strip()).parent
        results = {item["name"]: run(item, folder) for item in json.loads(Path(line.strip()).read_text())}
        (folder / "results.json").write_text(json.dumps(results))
        print("done", flush=True)


if __name__ == "__main__":
    main()
