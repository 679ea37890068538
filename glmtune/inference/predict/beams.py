"""Beam search in token ids: longest prompts first, as many rows as the memory takes.

This is transformers' own ``generate``; what needs no beams is the engine's. A batch is padded on the left, so
that all rows generate at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from glmtune.errors import GlmtuneError
from glmtune.inference.engine.many_prompts import GeneratedIds
from glmtune.inference.predict.logits_processors import logits_processors
from glmtune.inference.settings import GenerationSettings
from glmtune.memory import is_out_of_memory, release_memory
from glmtune.models.architectures.compiling import compiled_generation
from glmtune.models.architectures.kv_cache import Int8Cache
from glmtune.models.chat.stream import PREFILL_CHUNK_TOKENS
from glmtune.models.releases.families import Family
from glmtune.switch.model import decide_prompts, rows_keywords, switch_of

logger = logging.getLogger(__name__)


def search_beams(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Iterator[GeneratedIds]:
    """Answer prompts by beam search; see `generate_ids`, which calls this.

    The longest prompts come first, so that memory runs out at once or never. When it does, the batch is
    halved, and so are the batches after it.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, none empty; they fit the context with their answers.
        settings: how to generate.
        stop_ids: tokens that end an answer, at least one.
        pad_id: token put left of shorter prompts, masked out.

    Yields:
        One answer per prompt, a batch at a time.

    Raises:
        ConfigError: no compiler for ``compile``.
        GlmtuneError: memory does not suffice even for one row; the model's output is not finite.
    """
    waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    budget = settings.max_batch_tokens
    while waiting:
        size = _batch_rows(len(prompts[waiting[0]]), settings, budget)
        batch = waiting[:size]
        own = [prompts[i] for i in batch]
        sequences = _try_batch(model, own, settings, stop_ids, pad_id)
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
        answers, decided = sequences
        for place, (index, ids) in enumerate(zip(batch, answers, strict=True)):
            is_tuned = None if decided is None else decided[place]
            yield _cut(index, ids, stop_ids, len(prompts[index]), is_tuned)


def _row_tokens(prompt_length: int, settings: GenerationSettings) -> int:
    return settings.num_beams * (prompt_length + settings.answer_tokens)


def _batch_rows(longest: int, settings: GenerationSettings, budget: int) -> int:
    return max(1, min(settings.batch_size, budget // _row_tokens(longest, settings)))


def _try_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    stop_ids: Sequence[int],
    pad_id: int,
) -> tuple[list[list[int]], list[bool] | None] | None:
    """Generate one batch; None where memory ran out (whatever it held is free again on return)."""
    try:
        return _generate_batch(model, prompts, settings, stop_ids, pad_id)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the except block: while the error lives, its traceback keeps the tensors of what failed.
    release_memory()
    return None


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    stop_ids: Sequence[int],
    pad_id: int,
) -> tuple[list[list[int]], list[bool] | None]:
    """Return the answers, and what the switch of what is attached decided for each, if there is one."""
    length = max(len(prompt) for prompt in prompts)
    padded = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    input_ids_BS = torch.tensor(padded, dtype=torch.long, device=model.device)
    attention_mask_BS = torch.tensor(real, dtype=torch.long, device=model.device)
    generator: Any = model
    switch, decided, told = switch_of(model), None, dict[str, Any]()
    if switch is not None:
        tuned_B = decide_prompts(model, switch, [torch.tensor(each, device=model.device) for each in prompts])
        decided, told = tuned_B.tolist(), {**rows_keywords(model, tuned_B), "use_switch": False}
    sequences_BT = generator.generate(
        input_ids=input_ids_BS,
        attention_mask=attention_mask_BS,
        generation_config=GenerationConfig(
            # The penalty is a processor of ours: transformers' count depends on which rows share a batch,
            # and a run that goes on would answer otherwise than one never stopped.
            do_sample=False,
            num_beams=settings.num_beams,
            max_new_tokens=settings.answer_tokens,
            repetition_penalty=1.0,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            use_cache=True,
            prefill_chunk_size=_prefill_chunk_size(model, prompts),
            **(compiled_generation(model.device) if settings.compile else {}),
        ),
        **({"past_key_values": Int8Cache()} if settings.kv_cache == "int8" else {}),
        logits_processor=logits_processors(model, settings, attention_mask_BS),
        **told,
    )
    return sequences_BT[:, length:].tolist(), decided


def _prefill_chunk_size(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> int | None:
    """Return how many tokens to read at once; None = all.

    Padding needs a mask with one row per query, so long padded prompts are read in pieces. ChatGLM-6B sees
    its context in both directions and must read it, which is short, at once.
    """
    lengths = {len(prompt) for prompt in prompts}
    if getattr(model, "family", None) == Family.CHATGLM or len(lengths) == 1:
        return None
    return PREFILL_CHUNK_TOKENS if max(lengths) > PREFILL_CHUNK_TOKENS else None


def _cut(
    index: int, ids: Sequence[int], stop_ids: Sequence[int], num_prompt_tokens: int, is_tuned: bool | None
) -> GeneratedIds:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return GeneratedIds(
        index=index,
        token_ids=tuple(ids if end is None else ids[:end]),
        stop_reason="length" if end is None else "eos",
        num_prompt_tokens=num_prompt_tokens,
        stop_id=None if end is None else ids[end],
        is_tuned=is_tuned,
    )


def _memory_error(prompt_length: int, settings: GenerationSettings) -> GlmtuneError:
    return GlmtuneError(
        f"Memory does not suffice for one row: a prompt of {prompt_length} tokens and an answer of up to"
        f" `generation.max_new_tokens` {settings.answer_tokens} with `generation.num_beams`"
        f" {settings.num_beams}. Lower one of them, load the model in a smaller dtype"
        " (`model.dtype=bfloat16`), or free memory."
    )
