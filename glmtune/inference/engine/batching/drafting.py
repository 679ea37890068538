"""Drafts for the rows of a pass, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from glmtune.inference.engine.batching.acceptance import best_width
from glmtune.inference.engine.batching.next_tokens import NextToken
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.batching.running_rows import RunningRows
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

    def __init__(self, max_tokens: int, device: str, *, shares_answers: bool = False) -> None:
        """Begin without counts.

        Args:
            max_tokens: most tokens of a draft; 0: none at all.
            device: kind of device.
            shares_answers: look in the answers of rows that ended, too: those of one data set resemble each
                other. Not between people, who could tell from the speed what others were answered.
        """
        self._answers = TokenLookup() if shares_answers and max_tokens else None
        self.num_draft_tokens = self.num_accepted_tokens = 0
        self._max_tokens = max_tokens
        self._token_cost = TOKEN_COST.get(device, GPU_TOKEN_COST)

    def drafts(self, running: RunningRows) -> dict[Row, Draft]:
        """Return drafts of some rows, where and as far as they are worth computing."""
        if not self._max_tokens:
            return {}
        most, answers = self._max_tokens, self._answers
        found = {row: draft for row in running.rows if (draft := row.draft(most, answers))}
        width = best_width(
            [(len(draft.token_ids), row.acceptance.rate(draft.num_matched)) for row, draft in found.items()],
            num_rows=len(running),
            token_cost=self._token_cost,
            max_tokens=MAX_PASS_TOKENS,
        )
        if width == 1 or not running.states.fits(width):
            for row, draft in found.items():
                row.acceptance.skip(draft.num_matched)
            return {}
        return {row: replace(draft, token_ids=draft.token_ids[: width - 1]) for row, draft in found.items()}

    def keep_answer(self, row: Row) -> None:
        """Let the answer of a row that ended be looked up by others, where answers are shared."""
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
