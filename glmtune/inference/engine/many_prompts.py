"""Many prompts that are known beforehand: completed or scored in the calling thread.

Evaluations and predictions work so. What prompts share is read once (`prompt_groups`), and the batch is
refilled as completions end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glmtune.errors import ConfigError
from glmtune.inference.engine.batching.continuous_batching import ContinuousBatch
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.budget import Budget
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.next_token_scores import Scores, score_group
from glmtune.inference.engine.prompt_cache import PromptCache
from glmtune.inference.engine.prompt_groups import PromptGroup, group_prompts
from glmtune.inference.engine.stop_text import StopText
from glmtune.inference.engine.switched import apart, decide
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedIds:
    """One completion in tokens.

    Attributes:
        index: which prompt it completes.
        token_ids: all that were generated, without the token that ended it.
        stop_reason: ``eos``, ``stop`` (a stop string occurred) or ``length``.
        num_prompt_tokens: length of the prompt.
        is_tuned: what the switch of what is attached decided; None: there is none.
        stop_id: the token that ended it; None where none did.
        num_draft_tokens: tokens drafted and computed.
        num_accepted_tokens: how many of these were what the model chose anyway: so many passes were saved.
    """

    index: int
    token_ids: tuple[int, ...]
    stop_reason: str
    num_prompt_tokens: int
    is_tuned: bool | None = None
    stop_id: int | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated, the end token included."""
        return len(self.token_ids) + (self.stop_reason == "eos")


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText(GeneratedIds):
    """One completion as text.

    Attributes:
        text: decoded, cut at the first stop string.
    """

    text: str


def complete(
    model: EngineModel, settings: EngineSettings, budget: Budget, requests: Sequence[Request]
) -> Iterator[GeneratedIds]:
    """Complete the prompts of requests for the model as it is; see `Engine.complete`.

    Text is looked at where a request has a stream that may stop it; what the stream makes is not handed out.
    """
    _check_context(model, [(len(each.prompt_ids), each.sampling.max_new_tokens or 1) for each in requests])
    prompts = [each.prompt_ids for each in requests]
    groups = _groups(model, settings, prompts)
    decided = decide(model, budget, groups, prompts)

    def compute(places: Sequence[int]) -> Iterator[GeneratedIds]:
        for made in _complete(model, settings, budget, [requests[place] for place in places]):
            yield replace(made, index=places[made.index])

    for made, is_tuned in apart(model, decided, len(requests), compute):
        yield replace(made, is_tuned=is_tuned)


def _complete(
    model: EngineModel, settings: EngineSettings, budget: Budget, requests: Sequence[Request]
) -> Iterator[GeneratedIds]:
    """Complete the prompts of requests, all in the same way."""
    places: dict[Row, int] = {}
    for number, group in enumerate(_groups(model, settings, [each.prompt_ids for each in requests])):
        for place in group.members:
            request = requests[place]
            limit = request.sampling.max_new_tokens or _context(model) - len(request.prompt_ids)
            row = Row(len(places), request, limit, group=number, num_shared=group.num_shared)
            places[row] = place
    batch = ContinuousBatch(
        model,
        budget,
        kv_cache=settings.kv_cache,
        raises_errors=True,
        prompt_lookup_tokens=settings.prompt_lookup_tokens,
        shares_answers=True,
    )
    batch.add(list(places))
    left = len(places)
    while left:
        for row in batch.step():
            left -= 1
            assert row.finish_reason is not None, "it has ended"
            yield GeneratedIds(
                index=places[row],
                token_ids=tuple(row.generated),
                stop_reason=row.finish_reason,
                num_prompt_tokens=len(row.prompt),
                stop_id=row.stop_id,
                num_draft_tokens=row.num_draft_tokens,
                num_accepted_tokens=row.num_accepted_tokens,
            )


def complete_texts(
    model: EngineModel,
    settings: EngineSettings,
    budget: Budget,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    stop_text: StopText,
    samplings: Sequence[Sampling] = (),
) -> Iterator[GeneratedText]:
    """Complete prompts up to a stop text, greedily unless told otherwise; see `Engine.generate`."""
    chosen = samplings or [Sampling()] * len(prompts)
    requests = [
        Request(
            prompt_ids=tuple(prompt),
            sampling=replace(sampling, max_new_tokens=max_new_tokens),
            stop_ids=stop_ids,
            text_stream=stop_text.watch,
        )
        for prompt, sampling in zip(prompts, chosen, strict=True)
    ]
    for made in complete(model, settings, budget, requests):
        yield GeneratedText(
            index=made.index,
            text=stop_text.text(made.token_ids),
            token_ids=made.token_ids,
            stop_reason=made.stop_reason,
            num_prompt_tokens=made.num_prompt_tokens,
            is_tuned=made.is_tuned,
            stop_id=made.stop_id,
            num_draft_tokens=made.num_draft_tokens,
            num_accepted_tokens=made.num_accepted_tokens,
        )


def score_next_tokens(
    model: EngineModel,
    settings: EngineSettings,
    budget: Budget,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
) -> Iterator[tuple[int, Scores]]:
    """Score a few next tokens of each prompt; see `Engine.score_next`."""
    _check_context(model, [(len(prompt), 0) for prompt in prompts])
    ids = [tuple(prompt) for prompt in prompts]
    groups = _groups(model, settings, ids)

    def compute(places: Sequence[int]) -> Iterator[tuple[int, Scores]]:
        cache, chosen = PromptCache(model), [ids[place] for place in places]
        asked = [candidates[place] for place in places]
        # A switch leaves some prompts to the base: these are read apart, and share with one another alone.
        for group in groups if len(places) == len(ids) else _groups(model, settings, chosen):
            for place, scores in score_group(model, budget, cache, group, chosen, asked):
                yield places[place], scores

    decided = decide(model, budget, groups, ids)
    yield from (found for found, _ in apart(model, decided, len(ids), compute))


def _groups(
    model: EngineModel, settings: EngineSettings, prompts: Sequence[tuple[int, ...]]
) -> list[PromptGroup]:
    if model.can_share and settings.share_prefixes:
        return group_prompts(prompts, min_gain=settings.min_shared_gain)
    # Longest first, as in every group: what runs out of memory does so at once, and rows of a batch have
    # similar lengths.
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    return [PromptGroup(0, tuple(order))] if order else []


def _context(model: EngineModel) -> int:
    return model.config.max_position_embeddings


def _check_context(model: EngineModel, lengths: Sequence[tuple[int, int]]) -> None:
    check_fits(lengths, _context(model))


def check_fits(lengths: Sequence[tuple[int, int]], max_context_tokens: int) -> None:
    """Refuse a prompt that does not fit with what is to be generated.

    Args:
        lengths: tokens of each prompt, and most tokens of its answer.
        max_context_tokens: of the model.

    Raises:
        ConfigError: prompt and answer are longer.
    """
    longest, max_new_tokens = max(lengths, key=sum, default=(0, 0))
    if longest + max_new_tokens > max_context_tokens:
        raise ConfigError(
            f"The longest prompt has {longest} tokens, with `max_new_tokens` {max_new_tokens} that is"
            f" {longest + max_new_tokens}, and the model's context is {max_context_tokens} tokens."
            " Shorten the prompts (fewer exemplars), or lower `max_new_tokens`."
        )
