"""Answers by transformers' own `generate`, for models whose attention the engine cannot carry.

The engine keeps keys and values itself and attends over all of them. A model with windows of attention,
sinks, caps on scores, or states of another kind computes something else, and an engine that did not know
would answer a little worse, which nobody would notice. So a foreign model is looked at, and tried, before the
engine may have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.many_prompts import GeneratedText, check_fits
from glmtune.inference.engine.model import Drafting
from glmtune.inference.engine.stop_text import Decode, StopText
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.models.checkpoints.finite import check_output
from glmtune.models.other import OtherModel

FULL = "full_attention"
PROBE_TOKENS, PROBE_STEPS = 24, 4
TOLERANCE = 1e-3
"""Largest difference of log-probabilities between engine and model, float32; a wrong mask is off by more."""
TOLERANCE_16 = 0.1
"""The same in 16 bits."""


class PlainEngine:
    """Completes and scores prompts as `Engine` does, one batch after the other.

    Attributes:
        settings: ``batch_size`` alone counts here.
        max_context_tokens: of the model: prompt and answer together.
    """

    def __init__(self, model: PreTrainedModel, settings: EngineSettings | None = None) -> None:
        """Take a causal language model and switch it to evaluation.

        Raises:
            ConfigError: a setting that only the engine obeys.
        """
        self.settings = settings or EngineSettings()
        given = self.settings
        if given.kv_cache != "plain" or given.compile or given.prompt_lookup_tokens:
            raise ConfigError(
                "`engine.kv_cache=int8`, `engine.compile` and `engine.prompt_lookup_tokens` are the engine's,"
                f" which cannot compute a model of model_type `{unwrapped(model).config.model_type}`."
                " Leave them out."
            )
        self._model: Any = model.eval()
        self._config: Any = unwrapped(model).config
        self.max_context_tokens: int = int(getattr(self._config, "max_position_embeddings", 2**31))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        decode: Decode,
        stop: Sequence[str] = (),
        samplings: Sequence[Sampling] = (),
    ) -> Iterator[GeneratedText]:
        """Complete prompts greedily; see `Engine.generate`.

        Raises:
            ConfigError: tokens are to be drawn, which `generate` does by one stream for a whole batch.
        """
        if any(not sampling.is_greedy for sampling in samplings):
            raise ConfigError(
                "Answers are to be drawn, but a model of model_type"
                f" `{unwrapped(self._model).config.model_type}` is answered for by transformers' `generate`,"
                " whose draws depend on the batch and could not be repeated. Ask it greedily, or behind a"
                " server (`backend=openai`)."
            )
        check_fits([(len(prompt), max_new_tokens) for prompt in prompts], self.max_context_tokens)
        stop_text, ends = StopText(decode, stop), frozenset(stop_ids)
        for places in self._batches(prompts):
            inputs = self._padded([prompts[place] for place in places])
            made = self._generate(inputs, max_new_tokens, stop_ids)
            for place, row in zip(places, made, strict=True):
                kept, reason, stop_id = _cut(row, ends, stop_text)
                yield GeneratedText(
                    index=place,
                    text=stop_text.text(kept),
                    token_ids=tuple(kept),
                    stop_reason=reason,
                    num_prompt_tokens=len(prompts[place]),
                    stop_id=stop_id,
                )

    @torch.no_grad()
    def score_next(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Return log-probabilities of a few next tokens; see `Engine.score_next`."""
        check_fits([(len(prompt), 0) for prompt in prompts], self.max_context_tokens)
        for places in self._batches(prompts):
            inputs = self._padded([prompts[place] for place in places])
            logits_BV = self._model(**inputs, use_cache=False).logits[:, -1].float()
            check_output(self._model, logits_BV)
            logprobs_BV = logits_BV.log_softmax(-1)
            for row, place in enumerate(places):
                yield place, tuple(float(logprobs_BV[row, token]) for token in candidates[place])

    @torch.no_grad()
    def _generate(
        self, inputs: dict[str, Tensor], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """Return what is generated behind each prompt, padding included."""
        length = inputs["input_ids"].shape[1]
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": self._pad}
        made = self._model.generate(**inputs, **options, eos_token_id=list(stop_ids) or None)
        return made[:, length:].tolist()

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield places of prompts, the longest first, so that what runs out of memory does so at once."""
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        for start in range(0, len(order), self.settings.batch_size):
            yield order[start : start + self.settings.batch_size]

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = [[*[self._pad] * (width - len(row)), *row] for row in rows]
        mask = [[*[0] * (width - len(row)), *[1] * len(row)] for row in rows]
        device = unwrapped(self._model).device
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    @property
    def _pad(self) -> int:
        return int(getattr(self._config, "pad_token_id", None) or 0)


def engine_for(
    model: PreTrainedModel, settings: EngineSettings | None = None, draft: Drafting | None = None
) -> Engine | PlainEngine:
    """Return what answers with a model: the engine, or, for a foreign one it cannot compute, `generate`.

    Raises:
        ConfigError: a setting or a draft that only the engine obeys.
    """
    if not isinstance(unwrapped(model), OtherModel) or engine_computes(model):
        return Engine(model, settings, draft)
    if draft is not None:
        raise ConfigError(
            f"`draft.source` is given, but model_type `{unwrapped(model).config.model_type}` is answered for"
            " by transformers' `generate`, which takes no drafts here. Leave it out."
        )
    return PlainEngine(model, settings)


def check_engine_computes(model: PreTrainedModel) -> None:
    """Refuse to answer requests of users with a foreign model that the engine does not compute.

    Raises:
        ConfigError: it does not.
    """
    base = unwrapped(model)
    if isinstance(base, OtherModel) and not engine_computes(model):
        raise ConfigError(
            f"model_type `{base.config.model_type}` attends in a way that the request engine does not have "
            "(windows, sinks or caps on scores), so it cannot chat, serve or predict here. `glmtune eval` "
            "and `glmtune compare` answer its questions through transformers' `generate`."
        )


def engine_computes(model: PreTrainedModel) -> bool:
    """Say whether the engine computes a model as the model computes itself.

    Windows of attention reach further than any probe, so a configuration that has some is enough to say no.
    Everything else shows in a probe: a prompt and some steps behind it.

    Args:
        model: in evaluation mode; unchanged.
    """
    config: Any = unwrapped(model).config
    kinds = set(getattr(config, "layer_types", None) or [FULL])
    if getattr(config, "sliding_window", None) or kinds != {FULL}:
        return False
    # Prompts of rising length with one beginning, which is read once (a gain of one token is enough here): so
    # reading, sharing, and several steps of generation are each tried on numbers that must agree.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (PROBE_TOKENS + PROBE_STEPS,), generator=generator).tolist()
    prompts = [ids[: PROBE_TOKENS + step] for step in range(PROBE_STEPS)]
    asked = [[ids[PROBE_TOKENS + step], 0, 1] for step in range(PROBE_STEPS)]
    limit = TOLERANCE if unwrapped(model).dtype == torch.float32 else TOLERANCE_16
    engine, plain = Engine(model, EngineSettings(min_shared_gain=1)), PlainEngine(model)
    try:
        found, expected = dict(engine.score_next(prompts, asked)), dict(plain.score_next(prompts, asked))
        pairs = [(a, b) for place in expected for a, b in zip(found[place], expected[place], strict=True)]
        return all(abs(a - b) <= limit for a, b in pairs) and _same_steps(engine, plain, prompts[0], limit)
    except (GlmtuneError, TypeError, ValueError, AttributeError, RuntimeError, LookupError):
        return False  # it has no interface that the engine could use


def _same_steps(engine: Engine, plain: PlainEngine, prompt: Sequence[int], limit: float) -> bool:
    """Say whether both write the same behind a prompt, up to a tie."""
    options: dict[str, Any] = {"max_new_tokens": PROBE_STEPS, "stop_ids": (), "decode": str}
    ours, theirs = (next(each.generate([prompt], **options)).token_ids for each in (engine, plain))
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            scores = dict(plain.score_next([[*prompt, *theirs[:step]]], [[one, other]]))[0]
            return abs(scores[0] - scores[1]) <= limit
    return True


def _cut(row: Sequence[int], ends: frozenset[int], stop_text: StopText) -> tuple[list[int], str, int | None]:
    """Cut generated tokens at the first that ends an answer, or where a stop text is complete."""
    watch = stop_text.watch()
    kept: list[int] = []
    for token in row:
        if token in ends:
            return kept, "eos", token
        kept.append(token)
        watch.feed(token)
        if watch.is_stopped:
            return kept, "stop", None
    return kept, "length", None
