"""The largest moment of a step against the memory of tensors that are really alive, and what the parts must obey."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glmtune.planning.estimate import Estimate, estimate
from glmtune.planning.workload import Workload
from tests.planning.test_activations import FIRST, SECOND, batch_of, build, work


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        return result


def live_peak(w: Workload) -> int:
    """Train two steps and return the most bytes alive in the second, weights and states included."""
    model = build(w)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    batch = batch_of(w)
    replay = None if w.replay is None else batch_of(dataclasses.replace(w, batch=w.replay))
    autocast = torch.autocast("cpu", torch.bfloat16) if w.autocast else contextlib.nullcontext()

    def step() -> None:
        for _ in range(w.batch.accumulation):
            with autocast:
                loss = model(**batch, labelled_only=True).loss
                if replay is not None:
                    loss = loss + model(**replay, labelled_only=True).loss
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    mode = LiveBytes()
    for weight in model.parameters():
        mode.watch(weight)
    for state in optimizer.state.values():
        for value in state.values():
            mode.watch(value)
    with mode:
        step()
    return mode.peak


WIDE = dataclasses.replace(SECOND, hidden_size=192, mlp_size=512, num_heads=6, head_dim=32, vocab_size=2048)
WIDE_FIRST = dataclasses.replace(
    FIRST, hidden_size=192, mlp_size=768, num_kv_heads=6, head_dim=32, vocab_size=2048
)


def accumulated(w: Workload) -> Workload:
    return dataclasses.replace(w, batch=dataclasses.replace(w.batch, accumulation=2))


def replayed(w: Workload) -> Workload:
    """A third of the rows more, in a pass of their own."""
    batch, rows = w.batch, max(1, w.batch.rows // 3)
    labels = batch.num_labels // batch.rows * rows
    return dataclasses.replace(w, replay=dataclasses.replace(batch, rows=rows, num_labels=labels))


CASES = {
    "full": work(WIDE, rows=8),
    "full, one row": work(WIDE, rows=1),
    "full, accumulation": accumulated(work(WIDE, rows=4)),
    "full, checkpointing": work(WIDE, rows=16, checkpointing=True),
    "full, autocast": work(WIDE, rows=8, autocast=True),
    "full, autocast, checkpointing": work(WIDE, rows=16, autocast=True, checkpointing=True),
    "prefix": work(WIDE, tune="prefix", rows=8, is_padded=True),
    "prefix, bf16": work(WIDE, tune="prefix", rows=8, is_padded=True, weight_bytes=2),
    "prefix, int4": work(WIDE, tune="prefix", rows=4, is_padded=True, weight_bytes=2, method="int4"),
    "prefix, int4-e8": work(
        WIDE, tune="prefix", rows=4, is_padded=True, weight_bytes=2, method="int4", embeddings="int8"
    ),
    "prefix, int8 head": work(WIDE, tune="prefix", rows=4, is_padded=True, embeddings="int8"),
    "lora, int4-e8": work(WIDE, tune="lora", rows=4, is_padded=True, method="int4", embeddings="int8"),
    "prefix, checkpointing": work(WIDE, tune="prefix", rows=16, is_padded=True, checkpointing=True),
    "lora": work(WIDE, tune="lora", rows=8, is_padded=True),
    "lora, checkpointing": work(WIDE, tune="lora", rows=16, checkpointing=True),
    "full, replay": replayed(work(WIDE, rows=6)),
    "prefix, replay": replayed(work(WIDE, tune="prefix", rows=9, is_padded=True)),
    "lora, checkpointing, replay": replayed(work(WIDE, tune="lora", rows=15, checkpointing=True)),
    "first, full": work(WIDE_FIRST, rows=8),
    "first, prefix": work(WIDE_FIRST, tune="prefix", rows=8, is_padded=True),
    "first, prefix, int4-e8": work(
        WIDE_FIRST, tune="prefix", rows=4, is_padded=True, method="int4", embeddings="int8"
    ),
}


def training_peak(w: Workload) -> float:
    """The largest moment of training itself, without libraries and allocator."""
    found = _bare(w)
    moments = {name: total for name, total in found.moments.items() if name not in ("evaluation", "saving")}
    return max(moments.values())


def _bare(w: Workload) -> Estimate:
    from glmtune.planning import estimate as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_LIBRARIES", 0)
        patch.setattr(module, "CPU_SLACK", 0)
        patch.setattr(module, "CPU_FRAGMENTS", 0)
        patch.setattr(module, "CPU_STRANDED", 0)
        return estimate(w)


@pytest.mark.parametrize("name", CASES)
def test_largest_moment_is_that_of_live_tensors(name: str) -> None:
    measured = live_peak(CASES[name])
    assert training_peak(CASES[name]) == pytest.approx(measured, rel=0.1)
