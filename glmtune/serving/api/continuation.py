"""A plain continuation of a prompt, told in the events of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from glmtune.inference.requests.chat import AnswerEvent, Finished, Submits, TextDelta
from glmtune.inference.requests.generation import Generation
from glmtune.inference.requests.request import Piece, Request, TokenLogprob
from glmtune.serving.api.errors import ApiError


class Continuation:
    """What follows a prompt.

    Attributes:
        is_prompt_only: nothing of the continuation is told (``max_tokens`` 0; the engine makes at least 1).
    """

    def __init__(self, request: Request, *, is_prompt_only: bool = False, reports_end: bool = False) -> None:
        """Take a request that was not submitted yet.

        Args:
            request: for the engine.
            is_prompt_only: tell nothing of the continuation.
            reports_end: a token that would end it counts as one of it; the request ignores ends.
        """
        self.is_prompt_only = is_prompt_only
        self._request, self._reports_end = request, reports_end
        self._generation: Generation | None = None
        self._num_new = 0
        self._last_token: int | None = None

    def submit(self, engine: Submits, on_piece: Callable[[Piece], None]) -> Generation:
        """Hand it to the engine; pieces go to ``on_piece``, and from there to `events`."""
        self._generation = engine.submit(self._request, on_piece)
        return self._generation

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Of the prompt's tokens, once a piece came; None where they were not asked for.

        Raises:
            ApiError: the engine told none.
        """
        if self._request.sampling.prompt_logprobs is None:
            return None
        assert self._generation is not None, "asked for when a piece has come"
        told = self._generation.prompt_logprobs
        if len(told) != len(self._request.prompt_ids):
            raise ApiError(
                f"`logprobs` of the prompt: {len(told)} came for {len(self._request.prompt_ids)} tokens."
                " Leave `echo` or `logprobs` out.",
                status=500,
                code="engine_error",
            )
        return told

    def events(self, piece: Piece) -> Iterator[AnswerEvent]:
        """Yield the events of a piece; in the event loop, after `submit`."""
        assert self._generation is not None
        self._num_new += len(piece.token_ids) + (piece.finish_reason == "eos")
        self._last_token = piece.token_ids[-1] if piece.token_ids else self._last_token
        if not self.is_prompt_only and (piece.text or piece.logprobs):
            yield TextDelta(piece.text, piece.logprobs)
        if piece.finish_reason is None:
            return
        reason = "stop" if piece.finish_reason == "eos" else piece.finish_reason
        if self.is_prompt_only and reason == "stop":
            reason = "length"
        elif self._reports_end and reason == "length" and self._last_token in self._request.stop_ids:
            reason = "stop"
        yield Finished(
            reason,
            len(self._request.prompt_ids),
            0 if self.is_prompt_only else self._num_new,
            self._generation.num_cached_tokens,
            piece.error,
            is_tuned=self._generation.is_tuned,
        )
