"""Choosing the next token of every row of a batch; what a row gets does not depend on who else is in it."""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glmtune.inference.engine.sampling.distribution import Filters, draw
from glmtune.inference.engine.sampling.logit_changes import LogitChanges, has_changes
from glmtune.inference.engine.sampling.logprobs import prompt_logprobs, token_logprobs
from glmtune.inference.requests.request import TokenLogprob
from glmtune.inference.requests.sampling import Sampling

__all__ = ["ChosenToken", "TokenChooser", "prompt_logprobs"]

DAMAGED = (
    "The model's scores for the next token are not finite (NaN or infinity), so none can be chosen. Its"
    " weights or those of the adapter are damaged, or numbers became too large for their type: load it with"
    " dtype='bfloat16' or 'float32', or fetch its files again."
)


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """What a row goes on with.

    Attributes:
        token_id: the token; -1 where there is an error.
        logprob: how likely it was, where asked for.
        error: why none could be chosen: the row's logits are damaged. The other rows are not affected.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    error: str = ""


class _Row:
    """What is remembered of a request from one token to the next."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        self.sampling = sampling
        self._prompt_ids, self._answer_ids = prompt_ids, list(answer_ids)
        self._changes: LogitChanges | None = None
        self.has_changes = has_changes(sampling)
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        stream = np.random.PCG64(seed % 2**64)
        # One number a token, whoever shares the batch: so the numbers of an answer depend on its seed alone.
        stream.advance(len(answer_ids))
        self._stream = np.random.Generator(stream)

    def uniform(self) -> float:
        """Return the random number of the next token, at least 0 and below 1."""
        return self._stream.random()

    def change(self, logits_V: Tensor) -> None:
        """Apply biases and penalties in place."""
        if self._changes is None:  # made here, where the device is known
            self._changes = LogitChanges(self.sampling, self._prompt_ids, logits_V.device)
            for token_id in self._answer_ids:
                self._changes.add(token_id)
        self._changes.apply(logits_V)

    def add(self, token_id: int) -> None:
        """Count a token of the answer."""
        if self._changes is not None:
            self._changes.add(token_id)


class TokenChooser:
    """Chooses the next tokens of requests, and remembers of each what its later tokens depend on.

    Greedy rows cost one pass over their logits. Rows that are sampled, biased, penalised or want
    log-probabilities cost more, and only they do. ``ignore_eos`` bans no token: ids that end answers are
    chosen as any other, and it is the engine that goes on behind them.
    """

    def __init__(self) -> None:
        """Start without requests."""
        self._rows: dict[Hashable, _Row] = {}

    def add(
        self, key: Hashable, sampling: Sampling, prompt_ids: Sequence[int], *, answer_ids: Sequence[int] = ()
    ) -> None:
        """Take a request.

        Args:
            key: names it from now on. A request that is sent back to the queue may stay; it then goes on with
                the same random numbers and counts.
            sampling: how its tokens are chosen.
            prompt_ids: of its prompt, for the repetition penalty.
            answer_ids: tokens of its answer that were chosen before, where it was removed in between.
        """
        self._rows[key] = _Row(sampling, prompt_ids, answer_ids)

    def remove(self, key: Hashable) -> None:
        """Forget a request; one that is not known is none."""
        self._rows.pop(key, None)

    def choose(self, logits_BV: Tensor, keys: Sequence[Hashable | None]) -> list[ChosenToken | None]:
        """Choose a token per row; it counts as part of the row's answer at once.

        Args:
            logits_BV: float32, as the model gives them; left as they are.
            keys: whose rows these are, B of them; None for a row that is nobody's.

        Returns:
            What each row goes on with; None for nobody's.
        """
        largest_B, likeliest_B = logits_BV.max(dim=-1)
        # NaN and plus infinity come out on top, and minus infinity does where there is nothing else.
        is_usable = largest_B.isfinite().tolist()
        tokens: list[int] = likeliest_B.tolist()
        rows = {
            place: self._rows[key] for place, key in enumerate(keys) if key is not None and is_usable[place]
        }
        for place, token_id in self._unusual(logits_BV, rows).items():
            tokens[place] = token_id
        logprobs = _logprobs(logits_BV, rows, tokens)
        chosen: list[ChosenToken | None] = []
        for place, key in enumerate(keys):
            if key is None:
                chosen.append(None)
            elif place not in rows:
                chosen.append(ChosenToken(-1, error=DAMAGED))
            else:
                rows[place].add(tokens[place])
                chosen.append(ChosenToken(tokens[place], logprobs.get(place)))
        return chosen

    def _unusual(self, logits_BV: Tensor, rows: dict[int, _Row]) -> dict[int, int]:
        """Return the tokens of rows that are not plainly greedy."""
        drawn = [place for place, row in rows.items() if not row.sampling.is_greedy]
        greedy = [place for place, row in rows.items() if row.sampling.is_greedy and row.has_changes]
        places = drawn + greedy
        if not places:
            return {}
        is_all = places == list(range(len(logits_BV))) and not any(row.has_changes for row in rows.values())
        logits_RV = logits_BV if is_all else logits_BV[torch.tensor(places, device=logits_BV.device)]
        for logits_V, place in zip(logits_RV, places, strict=True):
            if rows[place].has_changes:
                rows[place].change(logits_V)
        chosen: list[int] = []
        if drawn:
            filters = Filters.of([rows[place].sampling for place in drawn], logits_RV.device)
            uniform = [rows[place].uniform() for place in drawn]
            uniform_R1 = torch.tensor(uniform, dtype=torch.float64, device=logits_RV.device).unsqueeze(1)
            chosen += draw(logits_RV[: len(drawn)], filters, uniform_R1).tolist()
        if greedy:
            chosen += logits_RV[len(drawn) :].argmax(dim=-1).tolist()
        return dict(zip(places, chosen, strict=True))


def _logprobs(logits_BV: Tensor, rows: dict[int, _Row], tokens: Sequence[int]) -> dict[int, TokenLogprob]:
    """Return the log-probabilities of the chosen tokens, for the rows that want them."""
    wanted = {
        place: row.sampling.logprobs for place, row in rows.items() if row.sampling.logprobs is not None
    }
    if not wanted:
        return {}
    logits_RV = logits_BV[torch.tensor(list(wanted), device=logits_BV.device)]
    entries = token_logprobs(logits_RV, [tokens[place] for place in wanted], list(wanted.values()))
    return dict(zip(wanted, entries, strict=True))
