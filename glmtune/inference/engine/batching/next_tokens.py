"""The next token of every row, chosen by its request; what is damaged in one row is no other's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glmtune.errors import GlmtuneError
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.batching.running_rows import RunningRows
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.sampling.choose import ChosenToken, TokenChooser
from glmtune.inference.engine.sampling.lookup import Draft
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


def step_rows(
    model: EngineModel, chooser: TokenChooser, running: RunningRows, drafts: Mapping[Row, Draft]
) -> list[tuple[Row, list[NextToken]]]:
    """Read the last token of every row, and its draft; choose what follows, and count what was read.

    Args:
        model: reads, and forms the logits.
        chooser: chooses.
        running: the rows, mutated: they hold the tokens read, of a draft those that were chosen.
        drafts: of some rows.

    Returns:
        Per row at least one token. Each was chosen behind tokens that were chosen before.
    """
    rows, hidden_BQD = running.step(model, {row: draft.token_ids for row, draft in drafts.items()})
    if drafts:
        chosen = _choose_along(model, chooser, rows, hidden_BQD, drafts)
    else:
        logits = model.unchecked_logits(hidden_BQD[:, 0])
        chosen = [(row, [token]) for row, token in choose_tokens(model, chooser, rows, logits)]
    # Last: a step that ran out of memory is repeated, over what it wrote. Of drafts those tokens stay that
    # were chosen: behind the last token as many as tokens follow it, but the newest, which is read next.
    running.advance([len(tokens) for _, tokens in chosen] if drafts else None)
    return chosen


def _choose_along(
    model: EngineModel,
    chooser: TokenChooser,
    rows: Sequence[Row],
    hidden_BQD: Tensor,
    drafts: Mapping[Row, Draft],
) -> list[tuple[Row, list[NextToken]]]:
    """Choose the tokens of every row as far as its draft is what it chooses anyway, and one more.

    Penalties, random numbers and log-probabilities are those of a row without a draft: a token is looked at
    only once all before it are chosen.
    """
    ids = [drafts[row].token_ids if row in drafts else () for row in rows]
    lengths = [1 + len(each) for each in ids]
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
            if (
                column < len(ids[place])
                and isinstance(token, ChosenToken)
                and token.token_id == ids[place][column]
            ):
                still.append(place)
        going, column = still, column + 1
    return list(found.items())
