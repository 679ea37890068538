"""The next token of every row, chosen by its request; what is damaged in one row is no other's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glmtune.errors import GlmtuneError
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.sampling.choose import ChosenToken, TokenChooser
from glmtune.models.checkpoints.finite import check_output

NextToken = ChosenToken | GlmtuneError
"""A token, or why there is none."""


def choose_tokens(
    model: EngineModel, chooser: TokenChooser, rows: Sequence[Row], logits: Tensor
) -> list[tuple[Row, NextToken]]:
    """Choose a token per row, ``logits`` being ``[rows, vocab]``."""
    problem: GlmtuneError | None = None
    finite: Sequence[bool] = ()
    try:
        check_output(model.model, logits)  # names the damaged weight, if there is one
    except GlmtuneError as error:
        problem, finite = error, torch.isfinite(logits).all(dim=-1).tolist()
    keys = [None if problem and not finite[place] else row.number for place, row in enumerate(rows)]
    found: list[tuple[Row, NextToken]] = []
    for row, token in zip(rows, chooser.choose(logits, keys), strict=True):
        if token is None:
            assert problem is not None
            found.append((row, problem))
        else:
            found.append((row, GlmtuneError(token.error) if token.error else token))
    return found


def choose_along_guesses(
    model: EngineModel,
    chooser: TokenChooser,
    rows: Sequence[Row],
    hidden_BQD: Tensor,
    guesses: Mapping[Row, Sequence[int]],
) -> list[tuple[Row, list[NextToken]]]:
    """Choose the tokens of every row as far as its guesses are what it chooses anyway, and one more.

    Args:
        model: forms the logits.
        chooser: chooses.
        rows: the rows.
        hidden_BQD: hidden states of each row's last token and of the guesses behind it.
        guesses: of some rows.

    Returns:
        Per row at least one token. Each was chosen behind tokens that were chosen before.
    """
    lengths = [1 + len(guesses.get(row, ())) for row in rows]
    # All logits in one product: the head is the largest of all layers.
    logits = model.unchecked_logits(
        torch.cat([hidden_SD[:length] for hidden_SD, length in zip(hidden_BQD, lengths, strict=True)])
    )
    starts = [sum(lengths[:place]) for place in range(len(rows))]
    found: dict[Row, list[NextToken]] = {row: [] for row in rows}
    going, column = list(range(len(rows))), 0
    while going:
        here = logits[[starts[place] + column for place in going]]
        chosen = choose_tokens(model, chooser, [rows[place] for place in going], here)
        still: list[int] = []
        for place, (row, token) in zip(going, chosen, strict=True):
            found[row].append(token)
            guess = guesses.get(row, ())
            if column < len(guess) and isinstance(token, ChosenToken) and token.token_id == guess[column]:
                still.append(place)
        going, column = still, column + 1
    return list(found.items())
