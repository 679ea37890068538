"""The engine of evaluations: completions and next-token probabilities of many prompts that begin alike.

What prompts share is read once; prompts are batched by length under a token budget; generation refills the
slots of requests that are done. Results do not depend on any of it (up to rounding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from glmtune.errors import ConfigError
from glmtune.inference.engine.budget import Budget, tokens_that_fit
from glmtune.inference.engine.continuous_batching import ContinuousBatch, Request
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.next_token_scores import score_group
from glmtune.inference.engine.prompt_cache import PromptCache
from glmtune.inference.engine.prompt_groups import PromptGroup, group_prompts
from glmtune.inference.engine.stop_text import Decode, StopText
from glmtune.inference.settings import EngineSettings
from glmtune.models.architectures.compiling import compile_parts

READ_TOKENS = {"cpu": 1024}
"""Prompt tokens per forward pass: more only drive a CPU's cache out (measured: 512 to 2048 are alike)."""
GPU_READ_TOKENS = 8192
"""Enough to keep a GPU busy; activations, which grow with it, stay small beside the weights."""


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """One completion.

    Attributes:
        index: which prompt it completes.
        text: decoded, cut at the first stop string.
        token_ids: all that were generated, without the token that ended it.
        stop_reason: ``eos``, ``stop`` (a stop string occurred) or ``length``.
        num_prompt_tokens: length of the prompt.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    stop_reason: str
    num_prompt_tokens: int

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated, the end token included."""
        return len(self.token_ids) + (self.stop_reason == "eos")


class Engine:
    """Greedy generation and next-token scores with one model.

    Attributes:
        settings: how much is done at once.
    """

    def __init__(self, model: PreTrainedModel, settings: EngineSettings | None = None) -> None:
        """Take a causal GLM (with prefix, LoRA or quantized layers as it is) and switch it to evaluation.

        Raises:
            ConfigError: it is to be compiled, and there is no compiler.
        """
        self.settings = settings or EngineSettings()
        if self.settings.compile:
            compile_parts(model)
        self._model = EngineModel(model)
        self.max_context_tokens: int = self._model.config.max_position_embeddings

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        decode: Decode,
        stop: Sequence[str] = (),
    ) -> Iterator[GeneratedText]:
        """Complete prompts greedily.

        Args:
            prompts: token ids, none empty.
            max_new_tokens: most tokens of a completion, the end token included.
            stop_ids: tokens that end a completion.
            decode: turns generated ids into text.
            stop: strings that end a completion.

        Yields:
            One completion per prompt, as they finish.

        Raises:
            ConfigError: a prompt and its completion may not fit the model's context.
            GlmtuneError: memory does not suffice even for one row.
        """
        self._check_context(prompts, max_new_tokens)
        rows = [tuple(prompt) for prompt in prompts]
        waiting = [
            Request(index, rows[index], number, group.num_shared)
            for number, group in enumerate(self._groups(rows))
            for index in group.members
        ]
        batch = ContinuousBatch(
            self._model,
            self._budget(),
            stop_ids=frozenset(stop_ids),
            stop_text=StopText(decode, stop),
            max_new_tokens=max_new_tokens,
            kv_cache=self.settings.kv_cache,
        )
        for request, reason in batch.run(waiting):
            text = batch.stop_text.text(request.generated)
            yield GeneratedText(request.index, text, tuple(request.generated), reason, len(request.prompt))

    def score_next(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Return the log-probabilities of a few next tokens over the whole vocabulary.

        Args:
            prompts: token ids, none empty.
            candidates: per prompt the ids asked for.

        Yields:
            Place of the prompt and the natural log-probability of each candidate, a batch at a time.

        Raises:
            ConfigError: a prompt does not fit the model's context.
            GlmtuneError: memory does not suffice even for one prompt.
        """
        self._check_context(prompts, 0)
        rows = [tuple(prompt) for prompt in prompts]
        budget, cache = self._budget(), PromptCache(self._model)
        for group in self._groups(rows):
            yield from score_group(self._model, budget, cache, group, rows, candidates)

    def _groups(self, rows: Sequence[tuple[int, ...]]) -> list[PromptGroup]:
        if self._model.can_share and self.settings.share_prefixes:
            return group_prompts(rows, min_gain=self.settings.min_shared_gain)
        # Longest first, as in every group: what runs out of memory does so at once, and rows of a batch
        # have similar lengths.
        order = sorted(range(len(rows)), key=lambda place: (-len(rows[place]), place))
        return [PromptGroup(0, tuple(order))] if order else []

    def _budget(self) -> Budget:
        dtype = torch.int8 if self.settings.kv_cache == "int8" else self._model.dtype
        room = tokens_that_fit(self._model.config, dtype, self._model.device)
        return Budget(
            rows=self.settings.batch_size,
            held_tokens=min(room, self.settings.max_batch_tokens),
            read_tokens=self.settings.read_tokens
            or READ_TOKENS.get(self._model.device.type, GPU_READ_TOKENS),
        )

    def _check_context(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + max_new_tokens > self.max_context_tokens:
            raise ConfigError(
                f"The longest prompt has {longest} tokens, with `max_new_tokens` {max_new_tokens} that is"
                f" {longest + max_new_tokens}, and the model's context is {self.max_context_tokens} tokens."
                " Shorten the prompts (fewer exemplars), or lower `max_new_tokens`."
            )
