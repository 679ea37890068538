"""Time a step of the engine with rows of unlike length: what a long one costs the others.

equal      sixteen rows of 150 tokens, give or take ten
unequal    one row of 900 tokens among fifteen of those
one bank   the same, attended to in one rectangle as wide as the longest row
spread     sixteen rows from 50 to 900 tokens
all long   sixteen rows of 900 tokens
alone      one row of 150 tokens
after 16   one row of 150 tokens, the fifteen others having left

A step is `EngineModel.step` and what goes with it: the order of the rows, room for the new token, the logits.
The arms take turns; medians are reported, and the medians of the ratios of a turn. Models: glm-tiny as it is,
and random ones as wide as ChatGLM2-6B (two heads of keys and values) and ChatGLM-6B (32), of few layers.

OMP_NUM_THREADS=1 python benchmarks/unequal_rows.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from glmtune import load_model
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.states import batch_states
from glmtune.inference.engine.states.batch_states import BatchStates
from glmtune.inference.engine.states.rows import NewRow
from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import build_model
from glmtune.models.releases.families import Family
from glmtune.prefix.encoder import prefix_shape

SHORT = tuple(140 + 20 * place // 15 for place in range(16))
WIDE = {
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "padded_vocab_size": 4992,
    "seq_length": 2048,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_model(case: str, num_layers: int, dtype: torch.dtype, device: str) -> EngineModel:
    """Load or make a model."""
    if case == "glm-tiny":
        return EngineModel(load_model("glm-tiny", dtype=str(dtype).removeprefix("torch."), device=device))
    kv_heads = int(case.removeprefix("wide-"))
    heads = {"multi_query_attention": kv_heads < 32, "multi_query_group_num": kv_heads}
    official = WIDE | heads | {"num_layers": num_layers, "torch_dtype": str(dtype).removeprefix("torch.")}
    torch.manual_seed(0)
    return EngineModel(build_model(native_config(official, Family.CHATGLM2)).to(device, dtype))


class Arm:
    """A batch whose rows stay as long as they are, however many steps it takes."""

    def __init__(
        self, model: EngineModel, lengths: Sequence[int], *, gone: int = 0, banks: bool = True
    ) -> None:
        """Fill a batch.

        Args:
            model: what steps.
            lengths: own tokens of each row.
            gone: how many of the first rows leave again.
            banks: whether rows may be kept apart.
        """
        self.model, self.states, shape = model, BatchStates(), prefix_shape(model.config)

        def random(length: int) -> torch.Tensor:
            size = (1, shape.num_kv_heads, length, shape.head_dim)
            return torch.randn(size, dtype=model.dtype, device=model.device)

        cost = batch_states.bank_cost
        if not banks:
            batch_states.bank_cost = lambda *_: 1e12
        rows = [
            NewRow([(random(length), random(length)) for _ in range(shape.num_layers)], length, 1024)
            for length in lengths
        ]
        row_ids = self.states.add(rows)
        batch_states.bank_cost = cost
        self.step()
        self.states.remove(row_ids[:gone])

    def step(self) -> None:
        """Step without counting the new tokens, so that the next step is the same."""
        self.states.tighten(keep_room=False)
        order = self.states.order
        positions = torch.tensor([[[self.states.length(row_id)]] for row_id in order])
        hidden_B1D = self.model.step([[5]] * len(order), positions.to(self.model.device), self.states)
        self.model.logits(hidden_B1D[:, 0]).argmax(-1).tolist()
        self.states.advance([0] * len(order))

    @property
    def banks(self) -> str:
        """Rows of each bank."""
        return "+".join(str(len(bank.rows)) for bank in self.states._banks)


def milliseconds(run: Callable[[], None], repeats: int, clock: Callable[[], float]) -> float:
    """Time a call, averaged over some."""
    start = clock()
    for _ in range(repeats):
        run()
    return 1000 * (clock() - start) / repeats


def main() -> None:
    """Take turns, then print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["glm-tiny", "wide-2", "wide-32"])
    parser.add_argument("--layers", type=int, default=2, help="of the wide models")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=4, help="steps of glm-tiny per turn; of the others 1")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cpu-time", action="store_true", help="not wall time: where others work on the machine, one thread"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    arms_of: dict[str, Callable[[EngineModel], Arm]] = {
        "equal": lambda model: Arm(model, SHORT),
        "unequal": lambda model: Arm(model, [900, *SHORT[1:]]),
        "one bank": lambda model: Arm(model, [900, *SHORT[1:]], banks=False),
        "spread": lambda model: Arm(model, range(50, 901, 56)),
        "all long": lambda model: Arm(model, [900] * 16),
        "alone": lambda model: Arm(model, [150]),
        "after 16": lambda model: Arm(model, [150] * 16, gone=15),
    }
    base = {"alone": "alone", "after 16": "alone"}
    head = ["model", "dtype", "threads", "rows", "banks", "ms", "of equal or alone"]
    sys.stdout.write(f"| {' | '.join(head)} |\n|---|---|---:|---|---|---:|---:|\n")
    for case in options.models:
        for dtype in options.dtypes:
            model = make_model(case, options.layers, getattr(torch, dtype), options.device)
            arms = {name: make(model) for name, make in arms_of.items()}
            for threads in options.threads:
                torch.set_num_threads(threads)
                found: dict[str, list[float]] = {name: [] for name in arms}
                for number in range(options.rounds + 1):
                    for name, arm in arms.items():
                        repeats = options.repeats if case == "glm-tiny" else 1
                        took = milliseconds(arm.step, repeats, clock)
                        if number:  # the first round warms caches up
                            found[name].append(took)
                for name, arm in arms.items():
                    against = found[base.get(name, "equal")]
                    ratio = statistics.median(
                        mine / other for mine, other in zip(found[name], against, strict=True)
                    )
                    figures = f"{arm.banks} | {statistics.median(found[name]):.1f} | {ratio:.2f}"
                    sys.stdout.write(f"| {case} | {dtype} | {threads} | {name} | {figures} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    with torch.no_grad():
        main()
