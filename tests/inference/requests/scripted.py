"""An engine double that writes given tokens, with the text stream of the request, as the engine does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glmtune.inference.requests.generation import Generation
from glmtune.inference.requests.request import FinishReason, Piece, Request, TokenLogprob


class ScriptedEngine:
    """Answers every request with the same tokens.

    Attributes:
        requests: what was asked.
        cancelled: requests that were cancelled.
    """

    def __init__(self, token_ids: Sequence[int], ends: FinishReason = "length") -> None:
        """Keep the tokens, and why an answer ends that no end token or stop text ends."""
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []
        self._token_ids = list(token_ids)
        self._ends: FinishReason = ends

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Generation:
        """Write the answer at once."""
        self.requests.append(request)
        generation = Generation(
            request, cancel=lambda each: self.cancelled.append(each.request), on_piece=on_piece
        )
        assert request.text_stream is not None
        stream = request.text_stream()
        for token_id in self._token_ids:
            if token_id in request.stop_ids:
                generation.put(Piece(stream.finish(), finish_reason="eos"))
                return generation
            text = stream.feed(token_id)
            scores = (TokenLogprob(token_id, -0.5),) if request.sampling.logprobs is not None else ()
            if stream.is_stopped:
                generation.put(Piece(text, (token_id,), scores, "stop"))
                return generation
            generation.put(Piece(text, (token_id,), scores))
        generation.put(Piece(stream.finish(), finish_reason=self._ends))
        return generation
