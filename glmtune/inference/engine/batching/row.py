"""A row of the batch: a request, how far its prompt is read, and what was generated for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from glmtune.inference.engine.adapters import BASE, RowAdapter
from glmtune.inference.engine.attention import KeysValues
from glmtune.inference.engine.batching.acceptance import AcceptanceRates
from glmtune.inference.engine.model import joined
from glmtune.inference.engine.prompt_groups import SharedPrompt
from glmtune.inference.engine.reading import Before
from glmtune.inference.engine.sampling.choose import ChosenToken
from glmtune.inference.engine.sampling.lookup import Draft, TokenLookup
from glmtune.inference.requests.generation import Generation
from glmtune.inference.requests.request import FinishReason, Piece, Request, TextStream, TokenLogprob


@dataclass(eq=False)
class Row:
    """A request on its way through the batch.

    Attributes:
        number: its place in the order of arrival; a row that is sent back takes this place again.
        request: what was asked.
        limit: most new tokens, the one that ends the answer included.
        adapter: the prefix or LoRA it runs with.
        undecided: what it will run with if the switch of that says so, once the base has read its prompt;
            None: no switch is to decide any more.
        generation: takes the pieces of its answer; None: nobody waits for them.
        group: which rows its shared prompt is shared with.
        num_shared: how many of its first tokens are read once for the whole group.
        generated: tokens so far, without the one that ends the answer.
        layers: keys and values of its own tokens that were read, each ``[1, K, S, H]``; let go of once the
            row runs.
        num_read: how many own tokens these are.
        leader: the row that reads, or has read, its first ``num_common`` tokens, for which it waits.
        num_common: see ``leader``.
        num_cached: how many tokens of the prompt another request has read.
        prompt_scores: log-probabilities of the prompt's tokens, where asked for, as far as it was read.
        finish_reason: why it ended; None while it has not.
        stop_id: the token that ended it; None where none did.
        is_damaged: whether its keys and values are worth nothing.
        num_draft_tokens: tokens that were drafted and computed for it.
        num_accepted_tokens: how many of them it would have chosen anyway.
        acceptance: how often its drafts are right.
    """

    number: int
    request: Request
    limit: int
    adapter: RowAdapter = BASE
    undecided: RowAdapter | None = None
    generation: Generation | None = None
    group: int = 0
    num_shared: int = 0
    generated: list[int] = field(default_factory=list)
    layers: tuple[KeysValues, ...] = ()
    num_read: int = 0
    leader: Row | None = None
    num_common: int = 0
    num_cached: int = 0
    prompt_scores: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    is_damaged: bool = False
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    acceptance: AcceptanceRates = field(default_factory=AcceptanceRates)
    _stream: TextStream | None = None
    _lookup: TokenLookup | None = None
    # Of the first token behind what was read: its positions (ChatGLM-6B has two), what each further token
    # adds to them, and how many tokens were generated when it was read.
    _positions: tuple[tuple[int, ...], tuple[int, ...], int] = ((), (), 0)

    @property
    def prompt(self) -> tuple[int, ...]:
        """Its token ids."""
        return self.request.prompt_ids

    @property
    def own(self) -> list[int]:
        """The tokens that it holds keys and values of itself: all but the shared ones."""
        return [*self.prompt[self.num_shared :], *self.generated]

    @property
    def last_token(self) -> int:
        """The token that the next step reads."""
        return self.generated[-1]

    @property
    def num_unread(self) -> int:
        """How many own tokens are to be read before it can run."""
        return len(self.prompt) - self.num_shared + len(self.generated) - self.num_read

    @property
    def num_held(self) -> int:
        """Columns that it holds while it runs: its last token is read with the next step."""
        own = len(self.prompt) - self.num_shared + len(self.generated)
        return self.adapter.num_columns + max(0, own - 1)

    @property
    def cost(self) -> int:
        """Columns that it may come to hold: its prefix, its own part of the prompt, and all new tokens."""
        adapter = self.undecided or self.adapter
        return adapter.num_columns + self.max_length

    @property
    def max_length(self) -> int:
        """Own tokens that it may come to hold."""
        return len(self.prompt) - self.num_shared + self.limit

    def decide(self, *, is_tuned: bool) -> None:
        """Note what the switch says, the prompt being read by the base; what is tuned begins anew."""
        wanted, self.undecided = self.undecided, None
        assert wanted is not None, "a row is decided once"
        if is_tuned:
            self.adapter = wanted
            self.prompt_scores = []
            self.forget_reading()
        if self.generation is not None:
            self.generation.is_tuned = is_tuned

    def before(self, shared: SharedPrompt) -> Before:
        """Return what stands in front of the tokens that are to be read next."""
        read = joined(shared.layers, self.layers) if self.layers else shared.layers
        return Before(read, self.adapter.prefix)

    def forget_reading(self) -> None:
        """Begin at its first token again."""
        self.layers, self.num_read, self.leader = (), 0, None

    def start(self, first: Sequence[int], step: Sequence[int]) -> None:
        """Note that all was read; ``first`` are the positions of the next token, ``step`` what more add."""
        self._positions = (tuple(first), tuple(step), len(self.generated))
        self.layers = ()
        if self.generation is not None and not self.generated:
            self.generation.prompt_logprobs = tuple(self.prompt_scores)

    def positions(self, count: int) -> list[list[int]]:
        """Return the positions of the last token and of those that may follow it, ``[T][count]``."""
        first, step, known = self._positions
        offset = len(self.generated) - 1 - known
        return [
            [begin + each * (offset + more) for more in range(count)]
            for begin, each in zip(first, step, strict=True)
        ]

    @property
    def num_to_draft(self) -> int:
        """Tokens that can be right at most: the one behind a draft is chosen in any case."""
        return self.limit - len(self.generated) - 1

    def draft(self, max_tokens: int, answers: TokenLookup | None = None) -> Draft | None:
        """Return tokens that may follow the last one, as many as the request allows; often there are none.

        Args:
            max_tokens: most tokens.
            answers: others' answers, in which a longer run may stand than in prompt and answer of this one.
        """
        count = min(max_tokens, self.num_to_draft)
        if count < 1:
            return None
        if self._lookup is None:
            self._lookup = TokenLookup([*self.prompt, *self.generated])
        own = self._lookup.propose(count)
        other = None if answers is None else answers.propose_behind(self._lookup.end, count)
        if own is None or (other is not None and other.num_matched > own.num_matched):
            return other
        return own

    def take(self, chosen: ChosenToken) -> Piece:
        """Append a token; return what that adds to the answer, with the reason if it ends there."""
        token, sampling = chosen.token_id, self.request.sampling
        if self._stream is None and self.request.text_stream is not None:
            self._stream = self.request.text_stream()
        if token in self.request.stop_ids and not sampling.ignore_eos:
            self.stop_id = token
            return self._last("", (), (), "eos")
        self.generated.append(token)
        if self._lookup is not None:
            self._lookup.add(token)
        logprobs: tuple[TokenLogprob, ...] = ()
        if chosen.logprob is not None:
            logprobs = (chosen.logprob,)
        text = self._stream.feed(token) if self._stream else ""
        if self._stream and self._stream.is_stopped:
            return Piece(text, (token,), logprobs, "stop")
        if len(self.generated) >= self.limit:
            return self._last(text, (token,), logprobs, "length")
        return Piece(text, (token,), logprobs)

    def give(self, piece: Piece) -> None:
        """Hand out a piece of the answer; with the last one the row is over."""
        self.finish_reason = piece.finish_reason
        if self.generation is not None:
            self.generation.put(piece)

    def _last(
        self, text: str, token_ids: tuple[int, ...], logprobs: Iterable[TokenLogprob], reason: FinishReason
    ) -> Piece:
        if self._stream is not None:
            text += self._stream.finish()
            if self._stream.is_stopped:  # a stop text in what had been held back
                reason = "stop"
        return Piece(text, token_ids, tuple(logprobs), reason)
