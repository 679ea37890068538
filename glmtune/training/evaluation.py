"""Loss and accuracy by answer token: what an evaluation sums up, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from glmtune.data.rows import RowSet
from glmtune.labels import IGNORE_INDEX
from glmtune.memory import WITH_OWN_MEMORY
from glmtune.training.row_order import LengthOrder


def sum_over_tokens(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], device: torch.device
) -> Tensor:
    """Sum loss and hits over the answer tokens of batches; the random numbers of training stay as they were.

    Sums, not means of batches: batches have different numbers of answer tokens, so the mean of their means
    would depend on which rows share a batch, and on how many processes share the rows.

    Args:
        model: as training wraps it; in the mode it had before when this ends.
        batches: on the device; ``labels`` int64 ``[B, S]``, and the model's other inputs.
        device: of the model.

    Returns:
        Loss (nats), tokens predicted right, tokens; float64 ``[3]``.
    """
    # Double, as float32 would lose digits over a whole split; MPS has none, so there the CPU adds up.
    sums = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    with undisturbed(model, device):
        for inputs in batches:
            labels = inputs["labels"][..., 1:]
            count = (labels != IGNORE_INDEX).sum()  # 0 in the filler of a process without a row
            output = model(**inputs, num_items_in_batch=count.clamp(min=1), labelled_only=True)
            hits = (output["predictions"] == labels[labels != IGNORE_INDEX]).sum()
            found = [part.to(sums) for part in (output["loss"], hits, count)]
            sums += torch.stack([found[0] * found[2], *found[1:]])
    return sums


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Generator[None]:
    """Run a block in evaluation mode and without gradients; random numbers and mode are as before it.

    Args:
        model: as training has it.
        device: of the model.
    """
    was_training = model.training
    model.eval()
    # Drawn from nothing but a custom model's layers; MPS' state cannot be set aside by this means.
    forks = device.type in WITH_OWN_MEMORY
    forked = torch.random.fork_rng([device], device_type=device.type) if forks else torch.random.fork_rng([])
    try:
        with forked, torch.no_grad():
            yield
    finally:
        model.train(was_training)


def eval_orders(rows: RowSet | None) -> dict[str, LengthOrder]:
    """Return the rows to evaluate on: all under "", those of a mixture's sets by their names.

    Long rows come first: little padding, and a batch that does not fit into memory fails at once.

    Args:
        rows: to evaluate on.
    """
    assert rows is not None, "nothing is evaluated without rows"
    if not rows.parts:
        return {"": LengthOrder(rows.lengths)}
    starts = accumulate((part.num_rows for part in rows.parts), initial=0)
    return {
        part.name: LengthOrder(rows.lengths, range(start, end))
        for part, (start, end) in zip(rows.parts, pairwise(starts), strict=True)
    }


def measure(
    rows: RowSet | None, sum_of: Callable[[LengthOrder], Tensor], *, prefix: str
) -> tuple[dict[str, float], Tensor]:
    """Measure all rows, and each set of a mixture by itself.

    Args:
        rows: to evaluate on.
        sum_of: returns `sum_over_tokens` of some rows, added up over all processes.
        prefix: what the names of the metrics start with.

    Returns:
        The metrics, and the sums of all rows.
    """
    sums = {name: sum_of(order) for name, order in eval_orders(rows).items()}
    total = torch.stack(list(sums.values())).sum(dim=0)
    metrics = per_token(total, prefix=prefix)
    for name in filter(None, sums):
        metrics |= per_token(sums[name], prefix=f"{prefix}_{name}")
    return metrics, total


def per_token(sums: Tensor, *, prefix: str) -> dict[str, float]:
    """Return the metrics of an evaluation.

    Args:
        sums: of `sum_over_tokens`, added up over all processes.
        prefix: what their names start with.
    """
    loss, hits, tokens = sums.tolist()
    return {
        f"{prefix}_loss": loss / max(tokens, 1),
        f"{prefix}_accuracy": hits / max(tokens, 1),
        f"{prefix}_tokens": int(tokens),
    }


def real_tokens(inputs: Mapping[str, Tensor], pad_token_id: int) -> Tensor:
    """Return which tokens of a batch are those of rows, bool ``[B, S]``.

    Args:
        inputs: of the model, with ``labels``.
        pad_token_id: written where there is no token.
    """
    mask = inputs.get("attention_mask")
    real = mask if mask is not None else inputs["input_ids"] != pad_token_id
    # A filler is alone in its batch, which then has no label; tokens of a batch without labels do not count.
    return real & (inputs["labels"] != IGNORE_INDEX).any()


def evaluations_since_best(args: TrainingArguments, state: TrainerState) -> int:
    """Return how many evaluations there were since the best one.

    Args:
        args: tell what is compared.
        state: of the trainer.
    """
    key = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
    best = state.best_global_step or 0
    return sum(key in entry and entry["step"] > best for entry in state.log_history)
