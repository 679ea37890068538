"""Drafts for the rows of a pass, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from glmtune.inference.engine.batching.acceptance import BY_MODEL, best_width
from glmtune.inference.engine.batching.model_drafts import ModelDrafts
from glmtune.inference.engine.batching.next_tokens import NextToken
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.batching.running_rows import RunningRows
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.sampling.lookup import Draft, TokenLookup

TOKEN_COST = {"cpu": 0.15}
"""What a further token in a pass costs where one token is 1. Measured at the width of 6B for up to 8 tokens:
INT4 0.15, with INT8 activations 0.1, bfloat16 0.02 (``benchmarks/results/prompt_lookup.md``). One number for
all, and no clock: by the time that passes take, a run would compute otherwise the second time."""
GPU_TOKEN_COST = 0.02
"""A GPU computes some dozens of tokens in the time of one. An estimate."""
MAX_PASS_TOKENS = 64
"""Of a pass with drafts. Beyond, arithmetic and not reading the weights takes the time, on any device."""
OPENING_TOKENS = 8
"""Of a prompt, its last ones, are kept with an answer: how answers begin stands behind how prompts end."""
MAX_ANSWER_TOKENS = 200_000
"""Of answers that are looked up, some 100 MB of Python's numbers; then it is begun anew."""


class Drafter:
    """Drafts tokens for running rows.

    Attributes:
        num_draft_tokens: computed so far.
        num_accepted_tokens: how many of these the rows would have chosen anyway.
    """

    def __init__(self, max_tokens: int, model: EngineModel, *, shares_answers: bool = False) -> None:
        """Begin without counts.

        Args:
            max_tokens: most tokens of a draft that is looked up; 0: none is.
            model: whose drafts these are, with the one that drafts for it, if there is one.
            shares_answers: look in the answers of rows that ended, too: those of one data set resemble each
                other. Not between people, who could tell from the speed what others were answered.
        """
        self._answers = TokenLookup() if shares_answers and max_tokens else None
        self.num_draft_tokens = self.num_accepted_tokens = 0
        self._max_tokens = max_tokens
        self._token_cost = TOKEN_COST.get(model.device.type, GPU_TOKEN_COST)
        self._draft_model = model.draft_model
        self._by_model = None if self._draft_model is None else ModelDrafts(self._draft_model.model)

    def drafts(self, running: RunningRows) -> dict[Row, Draft]:
        """Return drafts of some rows, where and as far as they are worth computing."""
        most, answers = self._max_tokens, self._answers
        found = {row: draft for row in running.rows if most and (draft := row.draft(most, answers))}
        asked: dict[Row, int] = {}  # of the model, where nothing was found
        if self._draft_model is not None:
            room = {row: min(self._draft_model.max_tokens, row.num_to_draft) for row in running.rows}
            asked = {row: count for row, count in room.items() if row not in found and count > 0}
        lengths = {row: (len(draft.token_ids), draft.num_matched) for row, draft in found.items()}
        lengths |= {row: (count, BY_MODEL) for row, count in asked.items()}
        width = best_width(
            [(length, row.acceptance.rate(matched)) for row, (length, matched) in lengths.items()],
            num_rows=len(running),
            token_cost=self._token_cost,
            max_tokens=MAX_PASS_TOKENS,
            draft_cost=self._draft_model.cost if self._draft_model is not None and asked else 0.0,
        )
        if width == 1 or not running.states.fits(width):
            for row, (_, matched) in lengths.items():
                row.acceptance.skip(matched)
            return {}
        cut = {row: replace(draft, token_ids=draft.token_ids[: width - 1]) for row, draft in found.items()}
        if self._by_model is not None and asked:
            made = self._by_model.drafts({row: min(count, width - 1) for row, count in asked.items()})
            cut |= {row: Draft(token_ids, BY_MODEL) for row, token_ids in made.items()}
        return cut

    def end(self, row: Row) -> None:
        """Let go of a row that ended; where answers are shared, others may look its answer up."""
        if self._by_model is not None:
            self._by_model.forget(row)
        if self._answers is None:
            return
        if len(self._answers) > MAX_ANSWER_TOKENS:
            self._answers = TokenLookup()
        end = () if row.stop_id is None else (row.stop_id,)
        for token in (*row.prompt[-OPENING_TOKENS:], *row.generated, *end):
            self._answers.add(token)

    def note(self, chosen: Sequence[tuple[Row, Sequence[NextToken]]], drafts: Mapping[Row, Draft]) -> None:
        """Learn from the tokens that were chosen: of a draft, all but the last of a row."""
        for row, tokens in chosen:
            if (draft := drafts.get(row)) is None:
                continue
            num_drafted, num_accepted = len(draft.token_ids), len(tokens) - 1
            row.acceptance.note(draft.num_matched, num_drafted, num_accepted)
            row.num_draft_tokens += num_drafted
            row.num_accepted_tokens += num_accepted
            self.num_draft_tokens += num_drafted
            self.num_accepted_tokens += num_accepted
