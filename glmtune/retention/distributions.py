"""How far a tuned model's next-token distributions are from the base's, along the base's own answers.

Both models read prompt and base's answer (teacher forcing), so every answer token is one comparison at the
same place, and one forward pass answers for all tokens at once. Of the base only this is kept, for every
answer token:

    64 likeliest tokens   their ids and natural log-probabilities
    the rest              the log-probability of all other tokens together, as one bucket

KL(base || tuned) is computed over these 65 outcomes. Putting outcomes together can only lower a divergence
(the log-sum inequality), so the figure is a lower bound of the divergence over the vocabulary; what it misses
is how the rest is spread within itself, which weighs little as the rest does.

A prefix or an adapter could be turned off and the base asked anew at each evaluation. That would cost a
second pass every time, and full tuning has no base left to ask, so one definition holds for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.data.collate import DynamicPaddingCollator
from glmtune.labels import IGNORE_INDEX
from glmtune.models.architectures.unwrap import unwrapped

TOP = 64
"""Tokens told apart; of glm-tiny's base the rest has under a thousandth of the probability."""
FORMED_NUMBERS = 1 << 23
"""Most float32 logits compared at once, 32 MiB: the largest tensors beside the model's own."""


@dataclass(frozen=True)
class BaseDistributions:
    """The base's next-token distributions along its answers, T tokens in all, K told apart.

    Attributes:
        token_ids: int32 ``[T, K]``: the likeliest tokens at every place.
        log_probs: float32 ``[T, K + 1]``, nats: of these tokens, and of all others together.
    """

    token_ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True, slots=True)
class AnswerReading:
    """What a model makes of one answer of the base.

    Attributes:
        index: which answer.
        kl_nats: KL(base || model) summed over the answer's tokens.
        is_greedy: whether the model finds each token the likeliest, and so would give this very answer.
    """

    index: int
    kl_nats: float
    is_greedy: bool


def base_distributions(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_token_id: int,
    batch_size: int,
) -> BaseDistributions:
    """Read the base's distributions along its answers.

    Args:
        model: the base, in evaluation mode.
        rows: prompt and answer of each, token ids.
        pad_token_id: written where there is no token.
        batch_size: rows in one forward pass.
    """
    starts = _starts(rows)
    token_ids: list[Tensor] = []
    log_probs: list[Tensor] = []
    places: list[int] = []
    for batch, logits_NV in _answer_logits(model, rows, range(len(rows)), pad_token_id, batch_size):
        places += [starts[row] + token for row in batch for token in range(len(rows[row][1]))]
        for piece_NV in logits_NV.split(_tokens_at_once(logits_NV)):
            scores_NV = piece_NV.float()
            count = min(TOP, scores_NV.shape[1] - 1)
            # On the CPU the order of equal values is that of their places; a stable order everywhere would
            # need a full sort, and equal values make the same divergence in any order.
            top_NK = scores_NV.topk(count, dim=1).indices
            token_ids.append(top_NK.to("cpu", torch.int32))
            log_probs.append(_buckets(scores_NV, top_NK).cpu())
    order = torch.tensor(places).argsort()
    return BaseDistributions(torch.cat(token_ids)[order], torch.cat(log_probs)[order])


def read_base_answers(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    base: BaseDistributions,
    *,
    which: Sequence[int],
    pad_token_id: int,
    batch_size: int,
) -> Iterator[AnswerReading]:
    """Let a tuned model read the base's answers; see the module for what is compared.

    Args:
        model: tuned, in evaluation mode.
        rows: prompt and answer of each, token ids; those that ``base`` was made of.
        base: of the model as it was before tuning.
        which: the rows to read.
        pad_token_id: written where there is no token.
        batch_size: rows in one forward pass.

    Yields:
        One reading per row of ``which``, long rows first.
    """
    starts = _starts(rows)
    for batch, logits_NV in _answer_logits(model, rows, which, pad_token_id, batch_size):
        places = torch.tensor([starts[row] + token for row in batch for token in range(len(rows[row][1]))])
        answer_N = torch.tensor([token for row in batch for token in rows[row][1]])
        kls: list[Tensor] = []
        hits: list[Tensor] = []
        step = _tokens_at_once(logits_NV)
        pieces = zip(logits_NV.split(step), places.split(step), answer_N.split(step), strict=True)
        for piece_NV, piece_N, tokens_N in pieces:
            scores_NV = piece_NV.float()
            hits.append(scores_NV.argmax(dim=1).cpu() == tokens_N)
            # Compared on the device: of the model's scores only one number per token leaves it.
            before_NK = base.log_probs[piece_N].to(scores_NV.device)
            after_NK = _buckets(scores_NV, base.token_ids[piece_N].long().to(scores_NV.device))
            # A bucket of no probability (-inf) adds nothing, whatever the other model gives it.
            terms_NK = (before_NK.exp() * (before_NK - after_NK)).where(before_NK > -torch.inf, 0.0)
            kls.append(terms_NK.sum(dim=1).cpu())
        lengths = [len(rows[row][1]) for row in batch]
        per_row = zip(batch, torch.cat(kls).split(lengths), torch.cat(hits).split(lengths), strict=True)
        for row, kl_N, hits_N in per_row:
            yield AnswerReading(row, float(kl_N.double().sum()), bool(hits_N.all()))


def _starts(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    """Return where the tokens of each answer begin, when all stand in one list."""
    return [0, *itertools.accumulate(len(answer) for _, answer in rows)]


def _tokens_at_once(logits_NV: Tensor) -> int:
    return max(1, FORMED_NUMBERS // logits_NV.shape[1])


def _buckets(scores_NV: Tensor, token_ids_NK: Tensor) -> Tensor:
    """Return log-probabilities of some tokens and of all others together, float32 ``[N, K + 1]``.

    Args:
        scores_NV: float32 logits; the tokens' own are overwritten.
        token_ids_NK: int64.
    """
    total_N1 = scores_NV.logsumexp(dim=1, keepdim=True)
    named_NK = scores_NV.gather(1, token_ids_NK)
    # Summed up, not taken as 1 minus the others: where these are nearly all, the difference would be noise.
    rest_N1 = scores_NV.scatter_(1, token_ids_NK, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([named_NK, rest_N1], dim=1) - total_N1


@torch.no_grad()
def _answer_logits(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    which: Sequence[int],
    pad_token_id: int,
    batch_size: int,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the rows of a batch and the logits that predict their answers' tokens, ``[N, vocab]``."""
    collate = DynamicPaddingCollator(pad_token_id)
    device = unwrapped(model).get_input_embeddings().weight.device
    # Long ones first: little padding, and what does not fit into memory fails at once.
    order = sorted(which, key=lambda row: (-sum(map(len, rows[row])), row))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        encoded = [
            {"input_ids": [*prompt, *answer], "labels": [*[IGNORE_INDEX] * len(prompt), *answer]}
            for prompt, answer in (rows[row] for row in batch)
        ]
        inputs = {name: value.to(device) for name, value in collate(encoded).items()}
        labels_BS = inputs.pop("labels")
        # The logits of a place predict the token after it.
        asked_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
        asked_BS[:, :-1] = labels_BS[:, 1:] != IGNORE_INDEX
        with _logits_only_at(model, asked_BS):
            logits: Any = model(**inputs, use_cache=False).logits
        yield batch, logits


@contextmanager
def _logits_only_at(model: nn.Module, asked_BS: Tensor) -> Generator[None]:
    """Let a model form logits at some places only, ``[N, vocab]`` row by row.

    By a hook before the head rather than by calling the parts one after the other: a model whose weights are
    sharded gathers them in the forward of the whole.
    """
    head = unwrapped(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][asked_BS],))
    try:
        yield
    finally:
        hook.remove()
