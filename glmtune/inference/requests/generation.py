"""A request that runs: its pieces as they come, its end, and how to cancel it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from glmtune.errors import GlmtuneError
from glmtune.inference.requests.request import FinishReason, Piece, Request, TokenLogprob


@dataclass(frozen=True, slots=True)
class Generated:
    """A whole answer.

    Attributes:
        text: all of it.
        token_ids: without the one that ended it.
        logprobs: of the tokens, where asked for.
        prompt_logprobs: of the prompt's tokens, where asked for.
        finish_reason: why it ended.
        num_prompt_tokens: length of the prompt.
        num_cached_tokens: how many of these were not read, as an earlier request had read them.
        num_new_tokens: tokens generated, the one that ended it included.
        is_tuned: what the adapter's switch decided: whether it applied; None: no switch was asked.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int
    is_tuned: bool | None = None


class Generation:
    """A request that was submitted; safe to use from any thread.

    Iterating yields its pieces as they come; a consumer that stops iterating calls `cancel`.

    Attributes:
        request: what was asked.
        prompt_logprobs: of the prompt's tokens, once it was read, where asked for.
        num_cached_tokens: how many of the prompt's tokens need not be read, once it was admitted.
        is_tuned: whether the adapter applies, once its switch has decided; None: no switch was asked.
    """

    def __init__(
        self,
        request: Request,
        *,
        cancel: Callable[[Generation], None],
        on_piece: Callable[[Piece], None] | None = None,
    ) -> None:
        """Start empty.

        Args:
            request: what was asked.
            cancel: tells the engine; called from any thread.
            on_piece: called with every piece, in the engine's thread, instead of keeping them for iteration:
                it must return at once and never raise.
        """
        self.request = request
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self.num_cached_tokens = 0
        self.is_tuned: bool | None = None
        self._cancel = cancel
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._put = on_piece or self._pieces.put

    def put(self, piece: Piece) -> None:
        """Hand a piece over; for the engine."""
        self._put(piece)

    def cancel(self) -> None:
        """Ask the engine to stop; the last piece then says ``cancelled``, unless the answer ended before."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Piece]:
        """Yield the pieces as they come; closing the iterator cancels.

        Raises:
            GlmtuneError: the request failed.
        """
        is_over = False
        try:
            while not is_over:
                piece = self._pieces.get()
                is_over = piece.finish_reason is not None
                if piece.finish_reason == "failed":
                    raise GlmtuneError(piece.error)
                yield piece
        finally:
            if not is_over:
                self.cancel()

    def result(self) -> Generated:
        """Wait for the end and return the whole answer.

        Raises:
            GlmtuneError: the request failed.
        """
        pieces = list(self)
        reason = pieces[-1].finish_reason
        assert reason is not None, "the last piece says why"
        token_ids = tuple(token for piece in pieces for token in piece.token_ids)
        return Generated(
            text="".join(piece.text for piece in pieces),
            token_ids=token_ids,
            logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            finish_reason=reason,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_new_tokens=len(token_ids) + (reason == "eos"),
            is_tuned=self.is_tuned,
        )
