"""Chunked cross entropy: the loss of a causal LM with logits formed for some labelled tokens at a time.

Logits are by far the largest tensor of a training step: 65,024 float32 numbers per token, 1 GiB for 4,096
tokens, and once more for their gradient. Most are never looked at (prompts and padding have no label), and
the others are turned into a loss chunk by chunk::

    hidden [T, D] --split--> [C, D] --head--> logits [C, V] --> loss, gradients of hidden and head
                                              (freed)           (kept)

Keeping gradients instead of logits is possible because the loss is a sum: they are known in the forward pass,
up to the factor that the backward pass brings.

Shapes: B batch, S sequence, D hidden width, T labels (places with loss), C labels of a chunk, V vocabulary. A
"row" of the head's input is one token's hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from glmtune.labels import IGNORE_INDEX

_Function = TypeVar("_Function", bound=Callable[..., Any])
LOGITS_PER_CHUNK = 2**26
"""Numbers formed at a time: 256 MiB in float32, which is 1,032 labels of a 65,024-token vocabulary."""
ROW_MULTIPLE = 256
"""On a CPU the head is given a multiple of so many rows, see `_logits`."""


@dataclass
class LabelledOutput(CausalLMOutputWithPast):
    """What a model returns when logits are formed for labels only.

    Attributes:
        loss: sum of the negative log-likelihoods, divided by the number of items.
        predictions: int64 ``[T]``, the most probable token of every label, in reading order; None while
            gradients are recorded.
        hidden_TD: where it was asked for in place of a loss, the hidden state that predicts every label.
        losses_T: where they were asked for, the negative log-likelihood of every label, float32.
    """

    predictions: Tensor | None = None
    hidden_TD: Tensor | None = None
    losses_T: Tensor | None = None


def rows_per_chunk(vocab_size: int) -> int:
    """Return how many labels have their logits formed at once, at least 256.

    >>> rows_per_chunk(65024), rows_per_chunk(151552)
    (1032, 442)
    """
    return max(ROW_MULTIPLE, LOGITS_PER_CHUNK // vocab_size)


def _uncompiled(function: _Function) -> _Function:
    """Keep a function out of compiled graphs: its shapes follow the number of labels, new in every batch."""
    return cast(_Function, torch.compiler.disable(function))


@_uncompiled
def chunked_cross_entropy(
    hidden_BSD: Tensor,
    labels: Tensor,
    lm_head: nn.Module,
    *,
    vocab_size: int,
    num_items: Tensor | int | None = None,
    base_TD: Tensor | None = None,
    hidden_only: bool = False,
    each_label: bool = False,
) -> LabelledOutput:
    """Form logits only where a label asks for one, and of those only some at a time.

    The head is spared on prompts and padding, and the memory of logits and their gradient is that of one
    chunk. Loss and gradients are those of the plain computation, up to the order of summation.

    Args:
        hidden_BSD: last hidden state.
        labels: int64 ``[B, S]``, −100 = no loss; shifted by one inside.
        lm_head: hidden to vocabulary, of any kind (quantized, adapted, gathered on use, ...).
        vocab_size: V.
        num_items: divides the summed loss; None: the number of labels. Without any label the loss is 0.
        base_TD: hidden states of the untuned base at the labels; the loss is then KL(base || model), summed
            over the vocabulary, in place of the cross entropy.
        hidden_only: return the hidden states at the labels, and form neither logits nor loss.
        each_label: return the loss of every label by itself, in reading order, and no sum of them.
    """
    # Four ways, by what the gradient needs: none at all; one chunk, where plain autograd is as sparing;
    # chunks that are computed again in the backward pass; chunks whose gradients are formed at once, the
    # usual and fastest.
    asked_BS = labels[:, 1:] != IGNORE_INDEX
    targets_T = labels[:, 1:][asked_BS]
    hidden_TD = hidden_BSD[:, :-1][asked_BS]
    num_labels = targets_T.numel()
    if hidden_only:
        return LabelledOutput(hidden_TD=hidden_TD)
    if each_label:
        return LabelledOutput(losses_T=_label_losses(lm_head, hidden_TD, targets_T, vocab_size))
    if base_TD is not None:
        targets_T = base_TD.to(hidden_TD.dtype)
    rows = rows_per_chunk(vocab_size)
    chunks = list(zip(hidden_TD.split(rows), targets_T.split(rows), strict=True))
    weights = [weight for weight in lm_head.parameters() if weight.requires_grad]
    predictions = None
    if not torch.is_grad_enabled() or not (weights or hidden_TD.requires_grad):
        found = [_loss_and_predictions(lm_head, *chunk) for chunk in chunks]
        total = torch.stack([loss for loss, _ in found]).sum()
        predictions = torch.cat([best for _, best in found])
    elif len(chunks) == 1:
        total = _summed_loss(lm_head, hidden_TD, targets_T)
    elif _must_recompute(lm_head, hidden_TD):
        parts = [checkpoint(_summed_loss, lm_head, *chunk, use_reentrant=False) for chunk in chunks]
        total = torch.stack(cast("list[Tensor]", parts)).sum()
    else:
        total = cast(Tensor, _ChunkedLoss.apply(lm_head, rows, hidden_TD, targets_T, *weights))
    items = num_labels if num_items is None else num_items
    loss = total / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1))
    return LabelledOutput(loss=loss, predictions=predictions)  # pyright: ignore[reportArgumentType]


def _label_losses(lm_head: nn.Module, hidden_TD: Tensor, targets_T: Tensor, vocab_size: int) -> Tensor:
    """Return the negative log-likelihood of every label, float32 ``[T]``.

    What each counts is known in the backward pass only (a preference loss weighs whole answers against each
    other), so the logits of all chunks but a single one are computed again there.
    """
    rows = rows_per_chunk(vocab_size)
    chunks = list(zip(hidden_TD.split(rows), targets_T.split(rows), strict=True))
    has_gradient = torch.is_grad_enabled() and (
        hidden_TD.requires_grad or any(weight.requires_grad for weight in lm_head.parameters())
    )
    if len(chunks) == 1 or not has_gradient:
        return torch.cat([_each_loss(lm_head, *chunk) for chunk in chunks])
    parts = [checkpoint(_each_loss, lm_head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(cast("list[Tensor]", parts))


def _each_loss(lm_head: nn.Module, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
    return nn.functional.cross_entropy(_logits(lm_head, hidden_CD), targets_C, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    """Summed loss whose gradients are formed in the forward pass, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, lm_head: nn.Module, rows: int, hidden_TD: Tensor, targets_T: Tensor, *weights: Tensor
    ) -> Tensor:
        """Sum the loss of all chunks and keep the gradients of the sum.

        Args:
            ctx: of autograd.
            lm_head: ``[C, D]`` to ``[C, V]``.
            rows: C.
            hidden_TD: float.
            targets_T: int64, or the base's hidden states, float ``[T, D]``.
            *weights: trained parameters of the head. It has them itself; as arguments they make autograd ask
                `backward` for their gradients.

        Returns:
            float32 ``[]``.
        """
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        hidden_grad = torch.empty_like(hidden_TD) if hidden_TD.requires_grad else None
        weight_grads: list[Tensor] = []
        for start in range(0, len(hidden_TD), rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                hidden_CD = hidden_TD[chunk].detach().requires_grad_(hidden_grad is not None)
                loss = _summed_loss(lm_head, hidden_CD, targets_T[chunk])
            wanted = [tensor for tensor in (hidden_CD, *weights) if tensor.requires_grad]
            grads = list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
            total += loss.detach()
            if hidden_grad is not None:
                hidden_grad[chunk] = grads.pop(0)
            # The first chunk's gradients become the sums; the others are added in place.
            for total_grad, grad in zip(weight_grads, grads, strict=start > 0):
                total_grad += grad
            weight_grads = weight_grads or grads
        ctx.grads = [hidden_grad, None, *weight_grads]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients by that of the sum ``[]``; one place per argument of `forward`."""
        grads: Sequence[Tensor | None] = ctx.grads
        del ctx.grads  # scaled in place, so good for one backward pass
        return None, None, *(None if grad is None else grad.mul_(grad_outputs[0]) for grad in grads)


def _logits(lm_head: nn.Module, hidden_CD: Tensor) -> Tensor:
    # Few shapes: on a CPU oneDNN compiles a bfloat16 kernel for every new number of rows.
    spare = -len(hidden_CD) % ROW_MULTIPLE if hidden_CD.device.type == "cpu" else 0
    return lm_head(nn.functional.pad(hidden_CD, (0, 0, 0, spare)))[: len(hidden_CD)].float()


def _summed_loss(lm_head: nn.Module, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
    return _loss_and_predictions(lm_head, hidden_CD, targets_C)[0]


def _loss_and_predictions(lm_head: nn.Module, hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    logits_CV = _logits(lm_head, hidden_CD)
    if not targets_C.is_floating_point():
        return nn.functional.cross_entropy(logits_CV, targets_C, reduction="sum"), logits_CV.argmax(-1)
    with torch.no_grad():  # the base's own head, where LoRA has adapted it (PEFT keeps it as `base_layer`)
        base_CV = _logits(getattr(lm_head, "base_layer", lm_head), targets_C)
    log_softmax = nn.functional.log_softmax
    loss = nn.functional.kl_div(
        log_softmax(logits_CV, -1), log_softmax(base_CV, -1), log_target=True, reduction="sum"
    )
    return loss, logits_CV.argmax(-1)


def _must_recompute(lm_head: nn.Module, hidden: Tensor) -> bool:
    """Say whether gradients can only be formed in the backward pass itself.

    So it is with weights that hooks gather from other processes (ZeRO-3, FSDP), and in float16, where small
    gradients live by the loss scale, which only the backward pass brings along.
    """
    device = hidden.device.type
    casts_to_half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return (
        hidden.dtype == torch.float16
        or casts_to_half
        or any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in lm_head.parameters())
    )
