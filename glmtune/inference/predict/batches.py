"""Batched generation in token ids: longest prompts first, as many rows as the memory takes.

This is transformers' own ``generate``, with beams and sampling; the engine beside it is greedy alone and
made for many prompts that begin alike. A batch is padded on the left, so that all rows generate at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from glmtune.errors import ConfigError, GlmtuneError
from glmtune.inference.predict.logits_processors import logits_processors
from glmtune.inference.settings import GenerationSettings
from glmtune.memory import is_out_of_memory, release_memory
from glmtune.models.architectures.compiling import compiled_generation
from glmtune.models.architectures.kv_cache import Int8Cache
from glmtune.models.chat.stream import PREFILL_CHUNK_TOKENS
from glmtune.models.releases.families import Family

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GeneratedIds:
    """One answer in tokens.

    Attributes:
        index: which prompt it answers.
        token_ids: the answer without the token that ended it.
        stop_reason: ``eos`` (the model ended it) or ``length`` (``max_new_tokens`` was reached).
        num_prompt_tokens: length of the prompt.
    """

    index: int
    token_ids: tuple[int, ...]
    stop_reason: str
    num_prompt_tokens: int

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated, the end token included."""
        return len(self.token_ids) + (self.stop_reason == "eos")


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    rows: Sequence[int] | None = None,
) -> Iterator[GeneratedIds]:
    """Answer prompts given and returned as token ids.

    The longest prompts come first, so that memory runs out at once or never. When it does, the batch is
    halved, and so are the batches after it. The model is in evaluation mode meanwhile, afterwards as before.

    Args:
        model: a causal language model.
        prompts: token ids, none empty.
        settings: how to generate.
        stop_ids: tokens that end an answer, at least one.
        pad_id: token put left of shorter prompts, masked out.
        rows: a lasting number per prompt that fixes its random stream; its place in ``prompts`` by default.

    Yields:
        One answer per prompt, a batch at a time.

    Raises:
        ConfigError: a prompt and its answer may not fit the model's context; no compiler for ``compile``.
        GlmtuneError: memory does not suffice even for one row.
    """
    rows = range(len(prompts)) if rows is None else rows
    _check_context(model, prompts, settings)
    waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    budget = settings.max_batch_tokens
    was_training = model.training
    model.eval()
    try:
        while waiting:
            size = _batch_rows(len(prompts[waiting[0]]), settings, budget)
            batch = waiting[:size]
            sequences = _try_batch(
                model, [prompts[i] for i in batch], [rows[i] for i in batch], settings, stop_ids, pad_id
            )
            if sequences is None:
                if len(batch) == 1:
                    raise _memory_error(len(prompts[batch[0]]), settings)
                # Half of what failed; later batches have shorter prompts and so more rows.
                budget = len(batch) // 2 * _row_tokens(len(prompts[batch[0]]), settings)
                logger.warning(
                    "Out of memory with %d rows at once; going on with %d.", len(batch), len(batch) // 2
                )
                continue
            del waiting[:size]
            for index, ids in zip(batch, sequences, strict=True):
                yield _cut(index, ids, stop_ids, len(prompts[index]))
    finally:
        model.train(was_training)


def _check_context(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> None:
    longest = max((len(prompt) for prompt in prompts), default=0)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest + settings.max_new_tokens > context:
        raise ConfigError(
            f"`generation.max_new_tokens` is {settings.max_new_tokens}, but with the longest prompt of"
            f" {longest} tokens that is {longest + settings.max_new_tokens}, and the model's context is"
            f" {context} tokens."
            f" Lower it to at most {context - longest}, or shorten the prompts with `data.max_source_length`."
        )


def _row_tokens(prompt_length: int, settings: GenerationSettings) -> int:
    return settings.num_beams * (prompt_length + settings.max_new_tokens)


def _batch_rows(longest: int, settings: GenerationSettings, budget: int) -> int:
    return max(1, min(settings.batch_size, budget // _row_tokens(longest, settings)))


def _try_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    settings: GenerationSettings,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]] | None:
    """Generate one batch; None where memory ran out (whatever it held is free again on return)."""
    try:
        return _generate_batch(model, prompts, rows, settings, stop_ids, pad_id)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the except block: while the error lives, its traceback keeps the tensors of what failed.
    release_memory()
    return None


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    settings: GenerationSettings,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    length = max(len(prompt) for prompt in prompts)
    padded = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    input_ids_BS = torch.tensor(padded, dtype=torch.long, device=model.device)
    attention_mask_BS = torch.tensor(real, dtype=torch.long, device=model.device)
    generator: Any = model
    sequences_BT = generator.generate(
        input_ids=input_ids_BS,
        attention_mask=attention_mask_BS,
        generation_config=GenerationConfig(
            # Sampling and the penalty are processors of ours: transformers' draw and count depend on
            # which rows share a batch, and a run that goes on would answer otherwise than one never stopped.
            do_sample=False,
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            use_cache=True,
            prefill_chunk_size=_prefill_chunk_size(model, prompts),
            **(compiled_generation(model.device) if settings.compile else {}),
        ),
        **({"past_key_values": Int8Cache()} if settings.kv_cache == "int8" else {}),
        logits_processor=logits_processors(settings, attention_mask_BS, rows),
    )
    return sequences_BT[:, length:].tolist()


def _prefill_chunk_size(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> int | None:
    """Return how many tokens to read at once; None = all.

    Padding needs a mask with one row per query, so long padded prompts are read in pieces. ChatGLM-6B sees
    its context in both directions and must read it, which is short, at once.
    """
    lengths = {len(prompt) for prompt in prompts}
    if getattr(model, "family", None) == Family.CHATGLM or len(lengths) == 1:
        return None
    return PREFILL_CHUNK_TOKENS if max(lengths) > PREFILL_CHUNK_TOKENS else None


def _cut(index: int, ids: Sequence[int], stop_ids: Sequence[int], num_prompt_tokens: int) -> GeneratedIds:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return GeneratedIds(
        index=index,
        token_ids=tuple(ids if end is None else ids[:end]),
        stop_reason="length" if end is None else "eos",
        num_prompt_tokens=num_prompt_tokens,
    )


def _memory_error(prompt_length: int, settings: GenerationSettings) -> GlmtuneError:
    return GlmtuneError(
        f"Memory does not suffice for one row: a prompt of {prompt_length} tokens and an answer of up to"
        f" `generation.max_new_tokens` {settings.max_new_tokens} with `generation.num_beams`"
        f" {settings.num_beams}. Lower one of them, load the model in a smaller dtype"
        " (`model.dtype=bfloat16`), or free memory."
    )
