"""Loss and accuracy by answer token: what an evaluation sums up, whatever the batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from glmtune.labels import IGNORE_INDEX


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
    was_training = model.training
    # Double, as float32 would lose digits over a whole split.
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for inputs in batches:
            labels = inputs["labels"][..., 1:]
            count = (labels != IGNORE_INDEX).sum()  # 0 in the filler of a process without a row
            output = model(**inputs, num_items_in_batch=count.clamp(min=1), labelled_only=True)
            hits = (output["predictions"] == labels[labels != IGNORE_INDEX]).sum()
            sums += torch.stack([output["loss"].double() * count, hits.double(), count.double()])
    model.train(was_training)
    return sums


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
